//! A certificate authority, for those who have one: it vouches for agents, so that they need not be paired. It should
//! vouch for nothing else, as every certificate of its is an agent's here.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{RootCertStore, pki_types};

/// See the module's text. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Authority {
    servers: Arc<WebPkiServerVerifier>,
    clients: Arc<dyn ClientCertVerifier>,
}

/// Why there is no authority.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// Its certificates cannot be read.
    #[error("cannot read the authority's certificates in {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: pki_types::pem::Error,
    },
    /// They cannot be used.
    #[error("the certificates in {path} are no authority's")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
}

impl Authority {
    /// The authority whose certificates, one or more, are in this PEM file.
    pub fn load(path: &Path) -> Result<Self, AuthorityError> {
        let unusable = |source| AuthorityError::Unusable { path: path.into(), source };
        let read = |source| AuthorityError::Read { path: path.into(), source };
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(path).map_err(read)? {
            roots.add(certificate.map_err(read)?).map_err(unusable)?;
        }
        let (roots, crypto) = (Arc::new(roots), crate::tls::crypto());
        let other = |error: rustls::server::VerifierBuilderError| unusable(rustls::Error::General(error.to_string()));
        Ok(Self {
            servers: WebPkiServerVerifier::builder_with_provider(
                Arc::clone(&roots),
                Arc::<CryptoProvider>::clone(&crypto),
            )
            .build()
            .map_err(other)?,
            clients: WebPkiClientVerifier::builder_with_provider(roots, crypto).build().map_err(other)?,
        })
    }

    /// That this is the certificate of the agent on the host of this name.
    pub(crate) fn vouch_for_server(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        self.servers.verify_server_cert(certificate, intermediates, name, &[], now).map(drop)
    }

    /// Whether this is the certificate of some agent, which proved to have its key already.
    pub(crate) fn vouches_for_client(&self, chain: &[CertificateDer<'_>]) -> bool {
        let Some((certificate, intermediates)) = chain.split_first() else { return false };
        self.clients.verify_client_cert(certificate, intermediates, UnixTime::now()).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    use tokio::net::TcpListener;

    use super::*;
    use crate::{Acceptor, Identity, LinkError, connect};

    const SOON: Duration = Duration::from_secs(5);

    struct Site {
        dir: tempfile::TempDir,
        issuer: Issuer<'static, KeyPair>,
        authority: Authority,
    }

    fn site() -> Site {
        let dir = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        std::fs::write(dir.path().join("ca.pem"), certificate.pem()).unwrap();
        let authority = Authority::load(&dir.path().join("ca.pem")).unwrap();
        Site { issuer: Issuer::new(params, key), authority, dir }
    }

    impl Site {
        /// For the agent of this host.
        fn identity(&self, host: &str) -> Identity {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new(vec![host.to_owned()]).unwrap();
            let certificate = params.signed_by(&key, &self.issuer).unwrap();
            let path = |end: &str| self.dir.path().join(format!("{host}.{end}"));
            std::fs::write(path("pem"), certificate.pem()).unwrap();
            std::fs::write(path("key"), key.serialize_pem()).unwrap();
            std::fs::set_permissions(path("key"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
            Identity::load(&path("pem"), &path("key")).unwrap()
        }
    }

    /// How it goes when these meet at 127.0.0.1: whether the server was told that the authority vouches for the client.
    async fn meet(
        client: &Identity,
        server: &Identity,
        clients_authority: Option<&Authority>,
        servers_authority: Option<&Authority>,
    ) -> Result<bool, LinkError> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let acceptor = Acceptor::new(server, servers_authority);
        let accepting = tokio::spawn(async move { acceptor.accept(listener.accept().await.unwrap().0, SOON).await });
        let connected = connect(&address, client, &[], clients_authority, SOON).await?;
        assert!(connected.vouched_for);
        Ok(accepting.await.unwrap().unwrap().vouched_for)
    }

    #[tokio::test]
    async fn agents_of_one_authority_need_not_be_paired() {
        let site = site();
        let (alpha, beta) = (site.identity("alpha.example.org"), site.identity("127.0.0.1"));
        let ours = Some(&site.authority);
        assert!(meet(&alpha, &beta, ours, ours).await.unwrap());
        assert!(!meet(&alpha, &beta, ours, None).await.unwrap(), "who has no authority is told of none");
    }

    #[tokio::test]
    async fn another_hosts_certificate_and_another_authority_are_worth_nothing() {
        let (site, other) = (site(), self::site());
        let (alpha, beta) = (site.identity("alpha.example.org"), site.identity("beta.example.org"));
        let ours = Some(&site.authority);
        let refused = meet(&alpha, &beta, ours, ours).await.unwrap_err();
        assert!(matches!(refused, LinkError::WrongIdentity { .. }), "beta is not at 127.0.0.1: {refused}");
        let strange = other.identity("127.0.0.1");
        let refused = meet(&alpha, &strange, ours, ours).await.unwrap_err();
        assert!(matches!(refused, LinkError::WrongIdentity { .. }), "{refused}");
        let here = site.identity("127.0.0.1");
        assert!(!meet(&strange, &here, ours, ours).await.unwrap(), "a client of another authority");
    }

    #[test]
    fn what_is_no_authority_or_does_not_fit_is_refused() {
        let site = site();
        let path = |name: &str| site.dir.path().join(name);
        assert!(matches!(Authority::load(&path("none")).unwrap_err(), AuthorityError::Read { .. }));
        std::fs::write(path("empty"), "").unwrap();
        assert!(matches!(Authority::load(&path("empty")).unwrap_err(), AuthorityError::Unusable { .. }));
        site.identity("alpha");
        site.identity("beta");
        assert!(Identity::load(&path("alpha.pem"), &path("beta.key")).is_err(), "another's key");
        std::fs::set_permissions(path("alpha.key"), std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        assert!(Identity::load(&path("alpha.pem"), &path("alpha.key")).is_err(), "everybody can read it");
    }
}
