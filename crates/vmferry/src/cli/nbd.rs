//! `nbd`: disks over the network.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use vmferry_link::Fingerprint;

#[derive(Subcommand)]
pub(crate) enum Nbd {
    /// Serve raw images, files or block devices, until interrupted
    #[command(after_long_help = "\
Examples:
  vmferry nbd serve web1.raw                                   to this host: nbd://127.0.0.1:10809/web1.raw
  vmferry nbd serve --listen unix:/run/web1.sock web1.raw      to this host: nbd+unix:///?socket=/run/web1.sock
  vmferry nbd serve --listen 0.0.0.0:10809 --tls-cert server.pem --tls-key server.key --tls-client-ca ca.pem web1.raw

An image is called by its file's name; a single one also by the empty name. While it is served it is locked as QEMU locks
it, so that no guest can have it at the same time: shut the guest down first. Formats other than raw are served as they
are, byte by byte, and never opened.

With TLS nothing at all is told without it. --tls-client-ca serves only clients with a certificate of that authority;
--tls-identity and --tls-peer go by the keys that agents have anyway (`vmferry peers` tells fingerprints).")]
    Serve(ServeOptions),
    /// Tell what a server has: one export, or all
    #[command(after_long_help = "\
Examples:
  vmferry nbd info nbd://beta:10809/web1.raw
  vmferry nbd info --list nbd+unix:///?socket=/run/web1.sock

URIs are those of the NBD project: nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH, and nbds:// or nbds+unix://
for TLS.")]
    Info(InfoOptions),
    /// Copy a disk; each side is a raw image or an NBD URI
    #[command(after_long_help = "\
Examples:
  vmferry nbd copy nbd://beta/web1.raw web1.raw
  vmferry nbd copy web1.raw nbds://beta/web1.raw --tls-ca ca.pem

Holes and zeroes are neither read nor sent, and are holes in the copy. A new file is made; one that exists has to be of the
same size, and is written over. When the command ends well, the copy is on the target's disk.")]
    Copy(CopyOptions),
}

#[derive(Args)]
pub(crate) struct ServeOptions {
    /// The images
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<PathBuf>,
    /// Where: unix:PATH, or ADDRESS:PORT
    #[arg(long, value_name = "WHERE", default_value = "127.0.0.1:10809")]
    pub listen: String,
    /// Let nobody write; several may then serve and read the same image
    #[arg(long)]
    pub read_only: bool,
    /// Let other hosts come without TLS: whoever reaches the port reads and writes the images
    #[arg(long)]
    pub plain: bool,
    #[command(flatten)]
    pub tls: ServerTlsOptions,
}

#[derive(Args)]
#[expect(clippy::struct_field_names, reason = "they are the names of the options")]
pub(crate) struct ServerTlsOptions {
    /// The server's certificate in PEM, with those between it and its authority's after it
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Its key in PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Serve only clients with a certificate of this authority
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_client_ca: Option<PathBuf>,
    /// Go by an agent's key instead of certificates
    #[arg(long, value_name = "FILE", conflicts_with = "tls_cert", requires = "tls_peer")]
    pub tls_identity: Option<PathBuf>,
    /// Serve the agent with this fingerprint; give it again for more
    #[arg(long, value_name = "FINGERPRINT", requires = "tls_identity")]
    pub tls_peer: Vec<Fingerprint>,
}

#[derive(Args)]
#[expect(clippy::struct_field_names, reason = "they are the names of the options")]
pub(crate) struct ClientTlsOptions {
    /// For `nbds://`: the authority of the server's certificate, in PEM
    #[arg(long, value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// The certificate to show to it, in PEM
    #[arg(long, value_name = "FILE", requires = "tls_key", requires = "tls_ca")]
    pub tls_cert: Option<PathBuf>,
    /// Its key, in PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// For `nbds://`: go by an agent's key instead of certificates
    #[arg(long, value_name = "FILE", conflicts_with = "tls_ca", requires = "tls_peer")]
    pub tls_identity: Option<PathBuf>,
    /// The fingerprint of the agent whose key the server has
    #[arg(long, value_name = "FINGERPRINT", requires = "tls_identity")]
    pub tls_peer: Option<Fingerprint>,
}

#[derive(Args)]
pub(crate) struct InfoOptions {
    /// The export, or any of its server's
    pub uri: String,
    /// List all that the server has
    #[arg(long)]
    pub list: bool,
    #[command(flatten)]
    pub tls: ClientTlsOptions,
}

#[derive(Args)]
pub(crate) struct CopyOptions {
    /// An image or an NBD URI
    pub source: String,
    /// An image or an NBD URI
    pub target: String,
    /// How many connections to a server that takes several
    #[arg(long, value_name = "NUMBER", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub connections: u8,
    /// How many requests are under way on each
    #[arg(long, value_name = "NUMBER", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=32))]
    pub requests: u8,
    #[command(flatten)]
    pub tls: ClientTlsOptions,
}
