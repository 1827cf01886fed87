//! `nbd`: serving, looking at and copying disks. No agent is needed.

use std::fs::OpenOptions;
use std::io;
use std::net::ToSocketAddrs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use indicatif::{ProgressBar, ProgressStyle};
use vmferry_link::{Identity, IdentityError};
use vmferry_nbd::backend::{Access, Backend, File};
use vmferry_nbd::client::{Remote, list};
use vmferry_nbd::copy::{How, Progress, copy as copy_disk};
use vmferry_nbd::server::{Listening, Served, Server, Where};
use vmferry_nbd::tls::{Certificate, ClientTls, ServerTls};
use vmferry_nbd::uri::{Place, Uri};
use vmferry_nbd::{Headers, Session};

use crate::cli::{ClientTlsOptions, CopyOptions, InfoOptions, ServeOptions, ServerTlsOptions};
use crate::failure::{Failure, NbdFailure};

pub(crate) async fn serve(options: ServeOptions) -> Result<(), Failure> {
    let at = place_to_listen(&options.listen)?;
    let tls = server_tls(&options.tls)?;
    if let Where::Tcp(address) = &at
        && !address.ip().is_loopback()
        && tls.is_none()
        && !options.plain
    {
        return Err(NbdFailure::Unprotected { at: at.to_string() }.into());
    }
    let access = if options.read_only { Access::Read } else { Access::Write };
    let mut served: Vec<Served> = Vec::new();
    for image in &options.images {
        let name = image.file_name().unwrap_or(image.as_os_str()).to_string_lossy().into_owned();
        if served.iter().any(|it| it.name == name) {
            return Err(NbdFailure::SameName(name).into());
        }
        let backend = Arc::new(File::open(image, access).map_err(NbdFailure::from)?);
        served.push(Served { name, description: String::new(), backend });
    }
    let names: Vec<String> = served.iter().map(|it| it.name.clone()).collect();
    let failed = |source| NbdFailure::Listen { at: at.to_string(), source };
    let listening = Listening::begin(Server::new(served, tls.clone()), &at).map_err(failed)?;
    for name in names {
        println!("{}", uri_of(listening.at(), &name, tls.is_some()));
    }
    let mut terminated =
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).map_err(Failure::Terminal)?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted.map_err(Failure::Terminal)?,
        _ = terminated.recv() => {}
    }
    drop(listening);
    Ok(())
}

fn uri_of(at: &Where, name: &str, tls: bool) -> String {
    let encode = |text: &str, free: &str| -> String {
        let byte = |byte: u8| match byte {
            it if it.is_ascii_alphanumeric() || free.as_bytes().contains(&it) => char::from(it).to_string(),
            it => format!("%{it:02X}"),
        };
        text.bytes().map(byte).collect()
    };
    let (tls, name) = (if tls { "s" } else { "" }, encode(name, "-._~"));
    match at {
        Where::Tcp(address) => format!("nbd{tls}://{address}/{name}"),
        Where::Unix(path) => {
            format!("nbd{tls}+unix:///{name}?socket={}", encode(&path.display().to_string(), "-._~/"))
        }
        Where::Abstract { .. } => unreachable!("no user can ask for one"),
    }
}

fn place_to_listen(text: &str) -> Result<Where, NbdFailure> {
    if let Some(path) = text.strip_prefix("unix:") {
        return match path {
            "" => Err(NbdFailure::Where(text.into())),
            path => Ok(Where::Unix(path.into())),
        };
    }
    let found = text.to_socket_addrs().ok().and_then(|mut it| it.next());
    found.map(Where::Tcp).ok_or_else(|| NbdFailure::Where(text.into()))
}

fn server_tls(options: &ServerTlsOptions) -> Result<Option<ServerTls>, NbdFailure> {
    if let Some(path) = &options.tls_identity {
        return Ok(Some(ServerTls::with_identity(&identity(path)?, options.tls_peer.clone())));
    }
    let Some(certificate) = certificate(options.tls_cert.as_ref(), options.tls_key.as_ref()) else { return Ok(None) };
    Ok(Some(ServerTls::with_certificate(&certificate, options.tls_client_ca.as_deref())?))
}

fn certificate(chain: Option<&PathBuf>, key: Option<&PathBuf>) -> Option<Certificate> {
    Some(Certificate { chain: chain?.clone(), key: key?.clone() })
}

/// One that is there: an identity that is made here is trusted by nobody.
fn identity(path: &Path) -> Result<Identity, IdentityError> {
    Identity::load(path, path)
}

/// How the server of this URI is trusted.
fn client_tls(uri: &Uri, text: &str, options: &ClientTlsOptions) -> Result<Option<ClientTls>, NbdFailure> {
    let tls = match (&options.tls_ca, &options.tls_identity, options.tls_peer) {
        (Some(authority), _, _) => {
            let name = match (&uri.tls_name, &uri.place) {
                (Some(name), _) => name.as_str(),
                (None, Place::Tcp { host, .. }) => host.as_str(),
                (None, Place::Unix(_)) => "localhost",
            };
            let certificate = certificate(options.tls_cert.as_ref(), options.tls_key.as_ref());
            Some(ClientTls::with_authority(authority, name, certificate.as_ref())?)
        }
        (None, Some(path), Some(peer)) => Some(ClientTls::with_identity(&identity(path)?, peer)),
        _ => None,
    };
    match (uri.tls, &tls) {
        (true, None) => Err(NbdFailure::NoTls(text.into())),
        (false, Some(_)) => Err(NbdFailure::PlainUri(text.into())),
        _ => Ok(tls),
    }
}

pub(crate) fn info(options: &InfoOptions) -> Result<(), Failure> {
    Ok(tell(options)?)
}

fn tell(options: &InfoOptions) -> Result<(), NbdFailure> {
    let uri: Uri = options.uri.parse()?;
    let tls = client_tls(&uri, &options.uri, &options.tls)?;
    if !options.list {
        tell_of(Remote::connect(&uri.place, tls.as_ref(), &uri.export, 1)?.session());
        return Ok(());
    }
    for told in list(&uri.place, tls.as_ref())? {
        println!("{:?}", told.name);
        // One that cannot be used just now is listed all the same.
        match Remote::connect(&uri.place, tls.as_ref(), &told.name, 1) {
            Ok(remote) => tell_of(remote.session()),
            Err(error) => println!("  {}", vmferry_api::in_one_line(&error)),
        }
    }
    Ok(())
}

fn tell_of(session: &Session) {
    let export = &session.export;
    let line = |what: &str, value: &str| println!("  {what:<12} {value}");
    line("size", &format!("{} ({} bytes)", ByteSize(export.size), export.size));
    if !export.description.is_empty() {
        line("description", &export.description.escape_debug().to_string());
    }
    line("can", &format!("{:?}", export.abilities).trim_matches(['{', '}']).replace('"', ""));
    let blocks = export.blocks;
    line("blocks", &format!("{} at least, {} preferred, {} at most", blocks.minimum, blocks.preferred, blocks.maximum));
    line(
        "headers",
        match session.headers {
            Headers::Simple => "simple",
            Headers::Structured => "structured",
            Headers::Extended => "extended",
        },
    );
    line("tells holes", if session.allocation.is_some() { "yes" } else { "no" });
}

pub(crate) async fn copy(options: &CopyOptions) -> Result<(), Failure> {
    let (source, target) = (open(&options.source, options, None)?, &options.target);
    let size = source.size();
    let made = !Uri::is_meant_by(target) && !Path::new(target).exists();
    let opened = open(target, options, Some(size))?;
    let requests = usize::from(options.connections) * usize::from(options.requests);
    let how = How { requests, target_is_zero: made };
    let progress = Arc::new(Progress::default());
    let copying = {
        let progress = Arc::clone(&progress);
        tokio::task::spawn_blocking(move || copy_disk(&*source, &*opened, how, &progress))
    };
    let ended = tokio::select! {
        copied = copying => copied.expect("copying does not panic").map_err(|it| NbdFailure::from(it).into()),
        () = show(&progress, size) => unreachable!("it is shown until it ends"),
        _ = tokio::signal::ctrl_c() => Err(Failure::Interrupted),
    };
    if ended.is_err() && made {
        let _ = std::fs::remove_file(target);
    }
    ended
}

/// One side of a copy. A target has a size to be of.
fn open(text: &str, options: &CopyOptions, to_be: Option<u64>) -> Result<Arc<dyn Backend>, NbdFailure> {
    if Uri::is_meant_by(text) {
        let uri: Uri = text.parse()?;
        let tls = client_tls(&uri, text, &options.tls)?;
        return Ok(Arc::new(Remote::connect(&uri.place, tls.as_ref(), &uri.export, options.connections.into())?));
    }
    let path = Path::new(text);
    let Some(size) = to_be else { return Ok(Arc::new(File::open(path, Access::Read)?)) };
    match OpenOptions::new().write(true).create_new(true).open(path) {
        Ok(file) => file.set_len(size).map_err(|source| NbdFailure::Make { path: path.into(), source })?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(source) => return Err(NbdFailure::Make { path: path.into(), source }),
    }
    let file = File::open(path, Access::Write)?;
    let is_file = std::fs::metadata(path).is_ok_and(|it| it.is_file());
    if is_file && file.size() != size {
        return Err(NbdFailure::OtherSize { path: path.into(), found: file.size(), needed: size });
    }
    Ok(Arc::new(file))
}

/// Shows how it goes, for ever.
async fn show(progress: &Progress, size: u64) {
    let template = "[{bar:24}] {binary_bytes}/{binary_total_bytes} {msg} ({eta} left)";
    let style = ProgressStyle::with_template(template).expect("the template is valid");
    let bar = ProgressBar::new(size).with_style(style.progress_chars("=> "));
    let begun = Instant::now();
    loop {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let data = progress.data.load(Relaxed);
        bar.set_position(progress.done.load(Relaxed));
        bar.set_message(format!("{}/s of data", ByteSize((data as f64 / begun.elapsed().as_secs_f64()) as u64)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_that_is_printed_leads_to_what_is_served() {
        for (at, name) in [
            (Where::Unix("/run/a b/s?.sock".into()), "disk 1%.raw"),
            (Where::Tcp("127.0.0.1:10809".parse().unwrap()), "a/b"),
            (Where::Tcp("[::1]:1".parse().unwrap()), "ü"),
        ] {
            let uri: Uri = uri_of(&at, name, true).parse().unwrap();
            assert_eq!((uri.export.as_str(), uri.tls, uri.place.to_string()), (name, true, at.to_string()));
        }
    }

    #[test]
    fn a_place_to_listen_is_understood_or_refused_with_an_example() {
        assert_eq!(place_to_listen("unix:/run/s").unwrap(), Where::Unix("/run/s".into()));
        assert!(matches!(place_to_listen("127.0.0.1:1").unwrap(), Where::Tcp(_)));
        for bad in ["unix:", "127.0.0.1", "", "10809"] {
            assert!(place_to_listen(bad).unwrap_err().to_string().contains("unix:PATH"), "{bad}");
        }
    }
}
