//! The API as programs see it: the document it serves, and what it makes of requests that are wrong.

use std::sync::Arc;
use std::time::Duration;

use reqwest::Method;
use uuid::Uuid;
use vmferry_agent::engine::{Protection, Setup};
use vmferry_agent::peers::{Answer, Peer, PeerError};
use vmferry_agent::peers::{CheckReply, Offer};
use vmferry_api::{Code, Problem};
use vmferry_bench::Mode;
use vmferry_bench::testbed::{Host, Testbed};
use vmferry_link::Identity;

use crate::bed::{self, Bed, guest, options};

/// Beta's agent, for somebody with this identity.
pub(crate) fn beta_as(testbed: &Testbed, identity: Identity) -> Peer {
    let beta = identity_of(testbed.beta()).fingerprint();
    Peer::new(&testbed.beta().address.to_string(), Arc::new(identity), vec![beta], None)
}

/// What a host's agent has made itself.
pub(crate) fn identity_of(host: &Host) -> Identity {
    Identity::load_or_make(&host.state_dir.join("identity.pem"), host.name).expect("it is there")
}

/// Beta's agent, for alpha.
fn beta(testbed: &Testbed) -> Peer {
    beta_as(testbed, identity_of(testbed.alpha()))
}

/// Asks an agent for something.
pub(crate) async fn ask(peer: &Peer, method: Method, path: &str, body: &str) -> Answer {
    peer.request(method, path, body.into(), Duration::from_secs(20)).await.expect("it answers")
}

/// Asks beta's agent, as alpha's would, whether it can take this.
pub(crate) async fn check(bed: &Bed, offer: &Offer) -> Result<CheckReply, Problem> {
    beta(bed).check(offer).await.map_err(|error| match error {
        PeerError::Refused { problem } => problem,
        other => panic!("{other}"),
    })
}

/// An offer of another VM than the one that runs, with one disk.
pub(crate) async fn offer_with_disk(bed: &Bed, disk: &std::path::Path) -> Offer {
    let view = bed.view(0).await;
    Offer {
        id: Uuid::new_v4(),
        from: "alpha".into(),
        spec: vmferry_api::VmSpec {
            name: "web2".into(),
            argv: view.argv.clone(),
            cwd: "/".into(),
            shared_ram: true,
            adopted: false,
            measuring: false,
            io_limits: None,
        },
        ram_bytes: view.ram_bytes,
        machine: view.machine.expect("known"),
        accelerator: view.accelerator.expect("known"),
        running: true,
        cpu_features: std::collections::BTreeSet::new(),
        images: vec![],
        own_disks: vec![],
        disks_session: None,
        disks: vec![disk.into()],
        read_only: vec![],
        networks: vec![],
        contents: std::collections::BTreeMap::default(),
        stopped: false,
        disks_are_shared: false,
        setup: Setup::default(),
        protection: Protection::default(),
        external: None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_document_describes_every_route_and_every_answer() {
    let testbed = Testbed::start(options()).await.expect("starts");
    let document: serde_json::Value =
        testbed.alpha().client().expect("a client").get("/openapi.json").await.expect("served");
    assert!(document["openapi"].as_str().is_some_and(|version| version.starts_with("3.")), "{document}");
    let paths = document["paths"].as_object().expect("paths");
    for (path, method) in [
        ("/v1/host", "get"),
        ("/v1/vms", "get"),
        ("/v1/vms", "post"),
        ("/v1/adopt", "post"),
        ("/v1/vms/{name}", "get"),
        ("/v1/vms/{name}/stop", "post"),
        ("/v1/vms/{name}/console", "get"),
        ("/v1/vms/{name}/start", "post"),
        ("/v1/vms/{name}/pause", "post"),
        ("/v1/vms/{name}/resume", "post"),
        ("/v1/vms/{name}/autostart", "put"),
        ("/v1/vms/{name}/resolve", "post"),
        ("/v1/incoming/{id}/fence", "post"),
        ("/v1/incoming/{id}/settled", "post"),
        ("/v1/outgoing/{id}", "get"),
        ("/v1/vms/{name}/disks", "get"),
        ("/v1/vms/{name}/disks/{disk}/move", "post"),
        ("/v1/vms/{name}/disks/{disk}/move", "get"),
        ("/v1/vms/{name}/disks/{disk}/move", "delete"),
        ("/v1/vms/{name}/migration", "post"),
        ("/v1/vms/{name}/migration", "delete"),
        ("/v1/vms/{name}/migration/limits", "post"),
        ("/v1/migrations", "get"),
        ("/v1/migrations", "post"),
        ("/v1/migrations/{id}/events", "get"),
        ("/v1/hello", "get"),
        ("/v1/join", "post"),
        ("/v1/tokens", "post"),
        ("/v1/peers", "get"),
        ("/v1/vms/{name}/migration/post-copy", "post"),
        ("/v1/peers", "post"),
        ("/v1/peers/{peer}", "delete"),
        ("/v1/incoming/check", "post"),
        ("/v1/incoming", "post"),
        ("/v1/incoming/{id}", "get"),
        ("/v1/incoming/{id}", "delete"),
        ("/v1/incoming/{id}/keep", "post"),
        ("/v1/incoming/{id}/commit", "post"),
        ("/v1/incoming/{id}/recover", "post"),
        ("/v1/incoming/{id}/relay", "post"),
        ("/v1/incoming/{id}/witness", "post"),
        ("/v1/vms/{name}/witness", "get"),
        ("/v1/migrations/{id}/witness", "get"),
        ("/v1/boot-files/{digest}", "get"),
        ("/v1/boot-files/{digest}", "put"),
        ("/v1/link-trials", "post"),
        ("/v1/link-benchmark", "post"),
        ("/v1/copies", "post"),
        ("/v1/copies/{id}", "delete"),
        ("/v1/copies/{id}/events", "get"),
        ("/v1/incoming-copies", "post"),
        ("/v1/vms/{name}/move", "post"),
        ("/v1/vms/{name}/move", "get"),
        ("/v1/vms/{name}/move", "delete"),
        ("/v1/incoming-vms", "post"),
        ("/v1/incoming-vms/check", "post"),
        ("/v1/incoming-vms/{id}/take", "post"),
        ("/v1/incoming-domains/check", "post"),
        ("/v1/incoming-domains", "post"),
        ("/v1/incoming-domains/{id}", "delete"),
        ("/v1/incoming-domains/{id}/{channel}", "post"),
        ("/v1/domains/{uuid}", "get"),
    ] {
        assert!(paths[path][method]["responses"].is_object(), "{method} {path} is not described");
    }
    let described: usize = paths.values().map(|it| it.as_object().expect("methods").len()).sum();
    assert_eq!(described, 62, "a route is missing in this test");
    // Every reference leads somewhere.
    let text = document.to_string();
    for reference in text.split("\"$ref\":\"#").skip(1).filter_map(|rest| rest.split('"').next()) {
        assert!(document.pointer(reference).is_some(), "{reference} leads nowhere");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_agent_answers_is_as_the_document_says() {
    let bed = bed::start(options(), guest(Mode::Idle)).await;
    let client = bed.alpha().client().expect("a client");
    let document: serde_json::Value = client.get("/openapi.json").await.expect("served");
    let vm: serde_json::Value = client.get("/v1/vms/web1").await.expect("served");
    let schema = &document["components"]["schemas"]["VmView"];
    for required in schema["required"].as_array().expect("required fields") {
        assert!(vm.get(required.as_str().expect("a name")).is_some(), "{required} is missing in {vm}");
    }
    for field in vm.as_object().expect("an object").keys() {
        assert!(schema["properties"].get(field).is_some(), "{field} is not described");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_make_no_sense_are_told_so() {
    let testbed = Testbed::start(options()).await.expect("starts");
    let beta = beta(&testbed);
    let answer = ask(&beta, Method::GET, "/v1/vms", "").await;
    assert!(!answer.status.is_success(), "VMs are not for other agents to see");
    let problem: Problem = serde_json::from_slice(&answer.body).expect("a problem");
    assert_eq!(problem.code, Code::BadRequest);
    for body in ["", "{}", "[1,2", "{\"id\": 5}"] {
        let answer = ask(&beta, Method::POST, "/v1/incoming", body).await;
        assert!(answer.status.is_client_error(), "{body}: {}", answer.status);
    }
    let huge = beta.request(Method::POST, "/v1/incoming", vec![b'['; 64 << 20], Duration::from_secs(20)).await;
    // Refused by an answer or by closing the connection: either way it is not taken.
    if let Ok(answer) = huge {
        assert!(answer.status.is_client_error(), "{}", answer.status);
    }
    let unknown = ask(&beta, Method::GET, &format!("/v1/incoming/{}", Uuid::new_v4()), "").await;
    assert!(!unknown.status.is_success());
    assert!(ask(&beta, Method::GET, "/v1/hello", "").await.status.is_success(), "it is still there");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_abandoned_can_never_be_prepared_or_committed_afterwards() {
    let bed = bed::start(options(), guest(Mode::Idle)).await;
    let beta = beta(&bed);
    let id = Uuid::new_v4();
    let path = format!("/v1/incoming/{id}");
    let step = |answer: Answer| {
        let state: serde_json::Value = serde_json::from_slice(&answer.body).expect("a state");
        state["step"].as_str().map(str::to_owned)
    };
    assert_eq!(step(ask(&beta, Method::DELETE, &path, "").await).as_deref(), Some("abandoned"));
    assert_eq!(
        step(ask(&beta, Method::POST, &format!("{path}/commit"), r#"{"run":true}"#).await).as_deref(),
        Some("abandoned")
    );
    let offer = Offer { id, disks: Vec::new(), ..offer_with_disk(&bed, "/nowhere".as_ref()).await };
    let offer = serde_json::to_string(&offer).expect("plain data");
    assert!(!ask(&beta, Method::POST, "/v1/incoming", &offer).await.status.is_success());
    assert!(bed.beta().show("web2").await.expect("answers").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn of_twenty_guests_at_once_for_memory_that_is_there_once_one_is_admitted() {
    let bed = bed::start(options(), guest(Mode::Idle)).await;
    let meminfo = std::fs::read_to_string("/proc/meminfo").expect("readable");
    let available = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:")).expect("it is told");
    let available: u64 = available.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10;
    let template = Offer {
        disks: Vec::new(),
        read_only: vec![],
        networks: vec![],
        contents: std::collections::BTreeMap::default(),
        disks_are_shared: true,
        protection: Protection::Relay,
        ..offer_with_disk(&bed, "/nowhere".as_ref()).await
    };
    let asking = (0..20).map(|number| {
        let mut offer = Offer { id: Uuid::new_v4(), ..template.clone() };
        offer.spec.name = format!("twentieth{number}");
        offer.ram_bytes = available / 10 * 6;
        let peer = beta(&bed);
        async move {
            let body = serde_json::to_string(&offer).expect("plain data");
            (offer.id, ask(&peer, Method::POST, "/v1/incoming", &body).await)
        }
    });
    let answers = futures_util::future::join_all(asking).await;
    let (taken, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(|(_, answer)| answer.status.is_success());
    assert_eq!((taken.len(), refused.len()), (1, 19), "{}", bed.logs());
    for (_, answer) in &refused {
        let problem: Problem = serde_json::from_slice(&answer.body).expect("a problem");
        assert_eq!(problem.code, Code::NoMemory, "{}", problem.message);
        assert!(problem.message.contains("MiB may be used there"), "{}", problem.message);
    }
    // What was given up can be promised again.
    let path = format!("/v1/incoming/{}", taken[0].0);
    assert!(ask(&beta(&bed), Method::DELETE, &path, "").await.status.is_success());
    let mut offer = Offer { id: Uuid::new_v4(), ..template };
    (offer.spec.name, offer.ram_bytes) = ("again".into(), available / 10 * 6);
    let body = serde_json::to_string(&offer).expect("plain data");
    let answer = ask(&beta(&bed), Method::POST, "/v1/incoming", &body).await;
    assert!(answer.status.is_success(), "{}", String::from_utf8_lossy(&answer.body));
    let path = format!("/v1/incoming/{}", offer.id);
    assert!(ask(&beta(&bed), Method::DELETE, &path, "").await.status.is_success());
}
