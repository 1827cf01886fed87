//! Who may talk to an agent, and what travels between two hosts in a form that only they can read.

use std::time::Duration;

use reqwest::Method;
use uuid::Uuid;
use vmferry_agent::engine::Protection;
use vmferry_agent::peers::Answer;
use vmferry_agent::peers::Offer;
use vmferry_api::{Code, Problem};
use vmferry_bench::Mode;
use vmferry_bench::testbed::{Host, Testbed, TestbedOptions};
use vmferry_link::{Identity, JoinToken};

use crate::api::{ask, beta_as, offer_with_disk};
use crate::bed::{self, Bed, VM, guest, options, text};

fn unpaired() -> TestbedOptions {
    TestbedOptions { paired: false, ..options() }
}

/// Runs a command that must end with this code; what it said.
async fn run(host: &Host, arguments: &[&str], code: i32) -> String {
    let output = host.vmferry(arguments).await.expect("vmferry runs");
    let said = text(&output);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}\n{}", host.agent_log());
    said
}

/// A host whose identity nobody knows.
fn stranger(testbed: &Testbed, name: &str) -> Identity {
    Identity::load_or_make(&testbed.dir().join(format!("{name}.pem")), name).expect("made")
}

fn code_of(answer: &Answer) -> Code {
    serde_json::from_slice::<Problem>(&answer.body).expect("a problem").code
}

async fn token(host: &Host) -> String {
    run(host, &["pair", "--quiet"], 0).await.trim().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hosts_are_paired_by_a_token_that_works_once() {
    let bed = bed::start(unpaired(), guest(Mode::Write)).await;
    let said = run(bed.alpha(), &["migrate", VM, "--to", &bed.to()], 3).await;
    assert!(said.contains("not the one that was paired") || said.contains("not paired"), "{said}");
    assert!(said.contains("vmferry pair"), "{said}");

    let printed = run(bed.beta(), &["pair"], 0).await;
    let command = printed.lines().find(|line| line.starts_with("vmferry pair ")).expect("a command to copy");
    let words: Vec<&str> = command.split(' ').skip(1).collect();
    let said = run(bed.alpha(), &words, 0).await;
    assert!(said.contains("paired with beta") && said.contains(&bed.to()), "{said}");
    let said = run(bed.alpha(), &words, 3).await;
    assert!(said.contains("not valid any more") && said.contains("make a new one"), "{said}");
    let said = run(bed.beta(), &words, 3).await;
    assert!(said.contains("this host's own"), "{said}");
    assert!(run(bed.alpha(), &["peers"], 0).await.contains("beta"));
    assert!(run(bed.beta(), &["peers"], 0).await.contains("alpha"));

    // By name, and back: both know where the other is.
    run(bed.alpha(), &["migrate", VM, "--to", "beta"], 0).await;
    bed.assert_runs_only_on(1).await;
    run(bed.beta(), &["migrate", VM, "--to", "alpha"], 0).await;
    bed.assert_runs_only_on(0).await;
    bed.assert_intact(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_damaged_or_expired_or_none_is_refused() {
    let testbed = Testbed::start(unpaired()).await.expect("starts");
    let short_lived = run(testbed.beta(), &["pair", "--quiet", "--expires", "1s"], 0).await;
    let short_lived = short_lived.trim();
    let damaged = &short_lived[..short_lived.len() - 3];
    assert!(run(testbed.alpha(), &["pair", damaged], 3).await.contains("damaged"));
    assert!(run(testbed.alpha(), &["pair", "ssh-ed25519"], 3).await.contains("begins with vmferry-"));
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert!(run(testbed.alpha(), &["pair", short_lived], 3).await.contains("expired"));
    // Also somebody whose clock, or program, does not mind.
    let secret = short_lived.parse::<JoinToken>().expect("whole").secret;
    let gamma = beta_as(&testbed, stranger(&testbed, "gamma"));
    let refused = gamma.join(&secret, "gamma", None).await.expect_err("too late");
    assert_eq!(refused.code(), Code::BadToken);
    assert!(run(testbed.beta(), &["pair", "--expires", "2d"], 3).await.contains("1 s to 24 h"));
    assert!(run(testbed.beta(), &["peers"], 0).await.contains("no peers yet"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_was_unpaired_is_refused_and_the_guest_runs_on() {
    let bed = bed::start(options(), guest(Mode::Write)).await;
    run(bed.beta(), &["unpair", "alpha"], 0).await;
    let said = run(bed.alpha(), &["migrate", VM, "--to", "beta"], 3).await;
    assert!(said.contains("beta is not paired with this host"), "{said}");
    assert!(bed.beta().agent_log().contains("refused an agent that is not paired"), "{}", bed.logs());
    assert!(run(bed.beta(), &["unpair", "alpha"], 3).await.contains("no peer named alpha"));
    bed.assert_runs_only_on(0).await;
    bed.assert_never_stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_was_set_up_anew_is_not_taken_for_the_old_one() {
    let mut bed = bed::start(options(), guest(Mode::Write)).await;
    let old = bed.beta().state_dir.join("identity.pem");
    bed.testbed.host_mut(1).stop_agent().await.expect("ends");
    std::fs::remove_file(old).expect("it was there");
    bed.testbed.host_mut(1).start_agent().await.expect("starts");
    let said = run(bed.alpha(), &["migrate", VM, "--to", "beta"], 3).await;
    assert!(said.contains("is not the one that was paired") && said.contains("vmferry unpair"), "{said}");
    let said = run(bed.alpha(), &["pair", &token(bed.beta()).await], 3).await;
    assert!(said.contains("a peer named beta is paired already, with another key"), "{said}");
    run(bed.alpha(), &["unpair", "beta"], 0).await;
    run(bed.beta(), &["unpair", "alpha"], 0).await;
    run(bed.alpha(), &["pair", &token(bed.beta()).await], 0).await;
    run(bed.alpha(), &["migrate", VM, "--to", "beta"], 0).await;
    bed.assert_runs_only_on(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_can_do_no_more_than_ask_who_is_there() {
    let bed = bed::start(options(), guest(Mode::Idle)).await;
    let mallory = beta_as(&bed, stranger(&bed, "mallory"));
    assert_eq!(mallory.hello().await.expect("introduces itself").hello.name, "beta");
    let offer = Offer { disks: Vec::new(), ..offer_with_disk(&bed, "/nowhere".as_ref()).await };
    let offer = serde_json::to_string(&offer).expect("plain data");
    let id = Uuid::new_v4();
    for (method, path, body) in [
        (Method::POST, "/v1/incoming/check".to_owned(), offer.as_str()),
        (Method::POST, "/v1/incoming".to_owned(), offer.as_str()),
        (Method::POST, "/v1/link-trials".to_owned(), ""),
        (Method::GET, format!("/v1/incoming/{id}"), ""),
        (Method::DELETE, format!("/v1/incoming/{id}"), ""),
        (Method::POST, format!("/v1/incoming/{id}/commit"), ""),
        (Method::POST, format!("/v1/incoming/{id}/relay"), ""),
    ] {
        let answer = ask(&mallory, method, &path, body).await;
        assert_eq!(code_of(&answer), Code::NotPaired, "{path}");
    }
    let join = r#"{"secret": "AAAAAAAAAAAAAAAAAAAAAAAAAA", "name": "mallory", "port": 1}"#;
    assert_eq!(code_of(&ask(&mallory, Method::POST, "/v1/join", join).await), Code::BadToken);
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_who_hold_on_to_connections_keep_no_peer_out() {
    let bed = bed::start(options(), guest(Mode::Write)).await;
    let (mallory, beta) = (stranger(&bed, "mallory"), crate::api::identity_of(bed.beta()).fingerprint());
    let mut held = Vec::new();
    for _ in 0..100 {
        let connected = vmferry_link::connect(&bed.to(), &mallory, &[beta], None, Duration::from_secs(10)).await;
        held.push(connected.expect("anybody can make a key"));
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    let mut closed = 0;
    for stream in &mut held {
        let mut byte = [0; 1];
        let read = tokio::io::AsyncReadExt::read(&mut stream.io, &mut byte);
        closed += usize::from(tokio::time::timeout(Duration::from_millis(5), read).await.is_ok());
    }
    assert_eq!(closed, 100 - 64, "strangers have 64 places");
    run(bed.alpha(), &["migrate", VM, "--to", "beta"], 0).await;
    bed.assert_runs_only_on(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_peer_cannot_touch_the_migration_of_another() {
    let bed = bed::start(options(), guest(Mode::Write)).await;
    let gamma = beta_as(&bed, stranger(&bed, "gamma"));
    let secret = token(bed.beta()).await.parse::<JoinToken>().expect("a token").secret;
    gamma.join(&secret, "gamma", None).await.expect("it is a peer now");
    let mut migrate = bed.begin_slow_migration().await;
    let id = bed.view(0).await.migration.expect("one is under way");
    for (method, rest) in [
        (Method::GET, ""),
        (Method::DELETE, ""),
        (Method::POST, "/keep"),
        (Method::POST, "/commit"),
        (Method::POST, "/recover"),
        (Method::POST, "/relay"),
    ] {
        let answer = ask(&gamma, method, &format!("/v1/incoming/{id}{rest}"), "").await;
        assert_eq!(code_of(&answer), Code::NotPaired, "{rest}");
    }
    let status = migrate.wait().await.expect("it ends");
    assert!(status.success(), "{}", bed.logs());
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_unpaired_in_the_middle_still_hands_its_guest_over() {
    let bed = bed::start(options(), guest(Mode::Write)).await;
    let mut migrate = bed.begin_slow_migration().await;
    run(bed.beta(), &["unpair", "alpha"], 0).await;
    let status = migrate.wait().await.expect("it ends");
    assert!(status.success(), "{}", bed.logs());
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

const TRUSTED: &str = "[[network]]\ncidr = \"127.0.0.0/8\"\nsecurity = \"plain\"";

async fn bed_with(config: [&str; 2]) -> Bed {
    let config = config.map(str::to_owned);
    bed::start(TestbedOptions { config, ..options() }, guest(Mode::Write)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_travel_plain_only_when_both_hosts_say_so() {
    let bed = bed_with([TRUSTED, ""]).await;
    let said = run(bed.alpha(), &["migrate", VM, "--to", "beta", "--dry-run"], 0).await;
    assert!(said.contains("TLS between the QEMUs") && said.contains("only one of the two hosts"), "{said}");
    drop(bed);
    let bed = bed_with([TRUSTED, TRUSTED]).await;
    let said = run(bed.alpha(), &["migrate", VM, "--to", "beta", "--dry-run"], 0).await;
    assert!(said.contains("none: both hosts trust the network"), "{said}");
    run(bed.alpha(), &["migrate", VM, "--to", "beta"], 0).await;
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_tries_to_talk_encryption_down_is_refused_and_logged() {
    let bed = bed::start(options(), guest(Mode::Idle)).await;
    let alpha = beta_as(&bed, crate::api::identity_of(bed.alpha()));
    let offer =
        Offer { disks: Vec::new(), protection: Protection::Plain, ..offer_with_disk(&bed, "/nowhere".as_ref()).await };
    let refused = alpha.prepare(&offer).await.expect_err("not like this");
    assert_eq!(refused.code(), Code::PlainRefused);
    assert!(bed.beta().agent_log().contains("refused a guest that comes unencrypted"), "{}", bed.logs());
    assert!(bed.beta().show("web2").await.expect("answers").is_none());
}

/// Has the agent fail to give this QEMU its key, as it would fail with one that has no TLS.
fn without_tls(bed: &Bed) {
    std::fs::write(bed.alpha().run_dir.join("vms").join(VM).join("tls"), "in the way").expect("written");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_cannot_encrypt_is_relayed_by_the_agents() {
    for arguments in [vec![], vec!["--no-post-copy", "--downtime", "10s"]] {
        let bed = bed::start(options(), guest(Mode::Write)).await;
        without_tls(&bed);
        let mut words = vec!["migrate", VM, "--to", "beta"];
        words.extend(arguments);
        run(bed.alpha(), &words, 0).await;
        assert!(bed.alpha().agent_log().contains("its connections are relayed"), "{}", bed.logs());
        bed.assert_runs_only_on(1).await;
        bed.assert_intact(1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relayed_post_copy_that_loses_its_connections_goes_on_over_new_ones() {
    let bed = bed::start_with(options(), guest(Mode::Write), &["-qmp", "unix:user.sock,server=on,wait=off"]).await;
    without_tls(&bed);
    let user =
        vmferry_qemu::Qmp::connect(&bed.dir().join("user.sock"), Duration::from_secs(5)).await.expect("connects");
    let migrate = crate::crashes::in_post_copy(&bed).await;
    user.execute(vmferry_qemu::qmp::commands::MigratePause {}).await.expect("the connection is cut");
    let output = migrate.wait_with_output().await.expect("it ends");
    bed::assert_success(&output, &bed);
    assert!(text(&output).contains("The connection is back"), "{}", text(&output));
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

/// `ssh` as far as vmferry uses it: runs the command on beta.
fn fake_ssh(bed: &Testbed) -> std::path::PathBuf {
    let dir = bed.dir().join("bin");
    std::fs::create_dir(&dir).expect("a folder");
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = -p ] && shift 2\n[ \"$1\" = root@127.0.0.1 ] || exit 255\n\
         PATH={vmferry}:$PATH VMFERRY_SOCKET={socket} exec sh -c \"$3\"\n",
        vmferry = std::path::Path::new(env!("CARGO_BIN_EXE_vmferry")).parent().expect("a folder").display(),
        socket = bed.beta().socket.display(),
    );
    std::fs::write(dir.join("ssh"), script).expect("written");
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(dir.join("ssh"), executable).expect("executable");
    dir
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_ssh_trusts_needs_no_pairing() {
    let bed = bed::start(unpaired(), guest(Mode::Write)).await;
    let path = format!("{}:{}", fake_ssh(&bed).display(), std::env::var("PATH").unwrap_or_default());
    let migrate = async |to: &str| {
        let output = bed.alpha().command(&["migrate", VM, "--to", to]).env("PATH", &path).output().await;
        let output = output.expect("runs");
        (output.status.code(), text(&output))
    };
    let (code, said) = migrate("ssh://nobody@127.0.0.1").await;
    assert!(code == Some(3) && said.contains("ssh could not log in"), "{said}");
    let (code, said) = migrate("ssh://-oProxyCommand=id").await;
    assert!(code == Some(2) && said.contains("is no ssh destination"), "{said}");
    let (code, said) = migrate("ssh://root@127.0.0.1:22").await;
    assert_eq!(code, Some(0), "{said}\n{}", bed.logs());
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_link_is_tried_encrypted_and_plain_only_where_both_hosts_permit_it() {
    let short = ["--time", "100ms", "--rounds", "1"];
    let bench = async |testbed: &Testbed| {
        let json = testbed.dir().join("link.json");
        let mut words = vec!["bench", "link", "beta", "--json"];
        let path = json.display().to_string();
        words.push(&path);
        words.extend(short);
        run(testbed.alpha(), &words, 0).await;
        let report: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(json).expect("written")).expect("JSON");
        let rows = report["rows"].as_array().expect("rows").clone();
        assert!(rows.iter().all(|row| row["mib_per_s"].as_f64().is_some_and(|speed| speed > 1.0)), "{report}");
        assert!(rows.iter().all(|row| row["urgent"]["asked"].as_u64().is_some_and(|asked| asked > 0)), "{report}");
        rows.iter().filter(|row| row["security"] == "plain").count()
    };
    let testbed = Testbed::start(options()).await.expect("starts");
    assert_eq!(bench(&testbed).await, 0);
    run(testbed.beta(), &["unpair", "alpha"], 0).await;
    assert!(run(testbed.alpha(), &["bench", "link", "beta"], 3).await.contains("not paired"));
    drop(testbed);
    let config = [TRUSTED.to_owned(), TRUSTED.to_owned()];
    let testbed = Testbed::start(TestbedOptions { config, ..options() }).await.expect("starts");
    assert_eq!(bench(&testbed).await, 2);
}
