//! TLS with certificates, between our ends and theirs.

use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use vmferry_nbd::client::{ClientError, Remote};
use vmferry_nbd::copy::{How, Progress, copy};
use vmferry_nbd::tls::{Certificate, ClientTls};
use vmferry_nbd::uri::Place;

use super::*;

const HOW: How = How { requests: 8, target_is_zero: true };

/// A folder of certificates as QEMU, libnbd and nbdkit want it.
fn authority(dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    params.distinguished_name.push(rcgen::DnType::CommonName, "an authority");
    std::fs::write(dir.join("ca-cert.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
    let issuer = Issuer::new(params, key);
    for (name, purpose) in
        [("server", ExtendedKeyUsagePurpose::ServerAuth), ("client", ExtendedKeyUsagePurpose::ClientAuth)]
    {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()]).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.extended_key_usages = vec![purpose];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        std::fs::write(dir.join(format!("{name}-cert.pem")), params.signed_by(&key, &issuer).unwrap().pem()).unwrap();
        std::fs::write(dir.join(format!("{name}-key.pem")), key.serialize_pem()).unwrap();
    }
}

fn certificate(dir: &Path, name: &str) -> Certificate {
    Certificate { chain: dir.join(format!("{name}-cert.pem")), key: dir.join(format!("{name}-key.pem")) }
}

fn server(dir: &Path) -> ServerTls {
    ServerTls::with_certificate(&certificate(dir, "server"), Some(&dir.join("ca-cert.pem"))).unwrap()
}

fn client(dir: &Path) -> ClientTls {
    ClientTls::with_authority(&dir.join("ca-cert.pem"), "localhost", Some(&certificate(dir, "client"))).unwrap()
}

#[test]
fn ours_meet_ours_and_nobody_else() {
    let bed = Bed::new();
    let (dir, other) = (bed.path("pki"), bed.path("other"));
    authority(&dir);
    authority(&other);
    let _listening = bed.listen(bed.file("image", Access::Read), Some(server(&dir)));
    let place = Place::Unix(bed.path("socket"));
    let connect = |tls: Option<&ClientTls>| Remote::connect(&place, tls, "disk", 2);
    bed.empty("out");
    let remote = connect(Some(&client(&dir))).unwrap();
    copy(&remote, &*bed.file("out", Access::Write), HOW, &Progress::default()).unwrap();
    bed.assert_same("image", "out");

    let told = |error: ClientError| format!("{:?}", std::error::Error::source(&error).unwrap());
    let without = connect(None).err().unwrap();
    assert!(told(without).contains("TLS only"), "who comes without TLS is told of it");
    assert!(connect(Some(&client(&other))).is_err(), "another authority's server");
    let nobody = ClientTls::with_authority(&dir.join("ca-cert.pem"), "localhost", None).unwrap();
    assert!(connect(Some(&nobody)).is_err(), "a client without a certificate");
    let stranger = certificate(&other, "client");
    let stranger = ClientTls::with_authority(&dir.join("ca-cert.pem"), "localhost", Some(&stranger)).unwrap();
    assert!(connect(Some(&stranger)).is_err(), "a client of another authority");
    let elsewhere = ClientTls::with_authority(&dir.join("ca-cert.pem"), "example.org", None).unwrap();
    assert!(connect(Some(&elsewhere)).is_err(), "a server of another name");
}

#[test]
fn agents_meet_by_their_identities_with_nothing_to_set_up() {
    let bed = Bed::new();
    let identity = |name: &str| vmferry_link::Identity::load_or_make(&bed.path(name), name).unwrap();
    let (alpha, beta, stranger) = (identity("alpha"), identity("beta"), identity("stranger"));
    let tls = ServerTls::with_identity(&alpha, vec![beta.fingerprint()]);
    let _listening = bed.listen(bed.file("image", Access::Read), Some(tls));
    let connect = |identity, server| {
        let tls = ClientTls::with_identity(identity, server);
        Remote::connect(&Place::Unix(bed.path("socket")), Some(&tls), "disk", 2)
    };
    bed.empty("out");
    let remote = connect(&beta, alpha.fingerprint()).unwrap();
    copy(&remote, &*bed.file("out", Access::Write), HOW, &Progress::default()).unwrap();
    bed.assert_same("image", "out");
    assert!(connect(&stranger, alpha.fingerprint()).is_err(), "a client that was not named");
    assert!(connect(&beta, stranger.fingerprint()).is_err(), "a server that was not awaited");
}

#[test]
fn a_server_without_tls_is_left_by_who_wants_it() {
    let bed = Bed::new();
    authority(&bed.path("pki"));
    let (_listening, _) = bed.serve("image", Access::Read);
    let tls = client(&bed.path("pki"));
    let error = Remote::connect(&Place::Unix(bed.path("socket")), Some(&tls), "disk", 1).err().unwrap();
    let error = std::error::Error::source(&error).unwrap().to_string();
    assert!(error.contains("this server has no TLS"), "{error}");
}

#[test]
fn libnbd_and_qemu_come_over_tls_and_are_refused_without() {
    if !there(&["nbdinfo", "nbdcopy", "qemu-img"]) {
        return;
    }
    let bed = Bed::new();
    let dir = bed.path("pki");
    authority(&dir);
    let backend = bed.file("image", Access::Read);
    let served = Served { name: "disk".into(), description: String::new(), backend };
    let at = Where::Tcp("127.0.0.1:0".parse().unwrap());
    let listening = Listening::begin(Server::new(vec![served], Some(server(&dir))), &at).unwrap();
    let Where::Tcp(address) = listening.at() else { unreachable!("it is TCP") };
    let (pki, port) = (dir.to_str().unwrap(), address.port());
    let uri = format!("nbds://localhost:{port}/disk?tls-certificates={pki}");
    let told = run("nbdinfo", &[&uri]);
    assert!(told.contains("with TLS"), "{told}");
    run("nbdcopy", &[&uri, &bed.text("out")]);
    bed.assert_same("image", "out");
    assert!(!attempt("nbdinfo", &[&format!("nbd://localhost:{port}/disk")]).0);

    let credentials = format!("tls-creds-x509,id=tls0,endpoint=client,dir={pki}");
    let target =
        format!("driver=nbd,server.type=inet,server.host=localhost,server.port={port},export=disk,tls-creds=tls0");
    let arguments = ["convert", "--object", &credentials, "--image-opts", &target, "-O", "raw", &bed.text("out2")];
    run("qemu-img", &arguments);
    bed.assert_same("image", "out2");
}

#[test]
fn nbdkit_and_qemu_nbd_are_used_over_tls() {
    if !there(&["nbdkit", "qemu-nbd"]) {
        return;
    }
    let bed = Bed::new();
    let dir = bed.path("pki");
    authority(&dir);
    let (image, socket, pki) = (bed.text("image"), bed.text("theirs"), dir.to_str().unwrap());
    let certificates = format!("--tls-certificates={pki}");
    let nbdkit = ["-f", "-r", "-U", &socket, "--tls=require", "--tls-verify-peer", &certificates, "file", &image];
    let credentials = format!("tls-creds-x509,id=tls0,endpoint=server,dir={pki},verify-peer=on");
    let qemu_nbd =
        ["-t", "-r", "-e", "4", "--object", &credentials, "--tls-creds", "tls0", "-f", "raw", "-k", &socket, &image];
    for (program, arguments) in [("nbdkit", &nbdkit[..]), ("qemu-nbd", &qemu_nbd)] {
        let theirs = bed.start("theirs", program, arguments);
        let place = Place::Unix(bed.path("theirs"));
        bed.empty("out");
        let remote = Remote::connect(&place, Some(&client(&dir)), "", 2).unwrap();
        copy(&remote, &*bed.file("out", Access::Write), HOW, &Progress::default()).unwrap();
        bed.assert_same("image", "out");
        let error = Remote::connect(&place, None, "", 1).err().unwrap();
        assert!(matches!(error, ClientError::Handshake { .. }), "{error}");
        drop((remote, theirs));
        let _ = std::fs::remove_file(bed.path("theirs"));
    }
}
