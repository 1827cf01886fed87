//! The API as programs see it: the document it serves, and what it makes of requests that are wrong.

use uuid::Uuid;
use vmferry_agent::api::types::{Code, Problem};
use vmferry_agent::engine::Setup;
use vmferry_agent::incoming::{CheckReply, Offer};
use vmferry_bench::Mode;
use vmferry_bench::testbed::Testbed;

use crate::bed::{self, Bed, guest, options};

/// Asks beta's agent, as another agent would, whether it can take this.
pub(crate) async fn check(bed: &Bed, offer: &Offer) -> Result<CheckReply, Problem> {
    let url = format!("http://{}/v1/incoming/check", bed.beta().address);
    let reply = reqwest::Client::new().post(url).json(offer).send().await.expect("beta answers");
    match reply.status().is_success() {
        true => Ok(reply.json().await.expect("a reply")),
        false => Err(reply.json().await.expect("a problem")),
    }
}

/// An offer of another VM than the one that runs, with one disk.
pub(crate) async fn offer_with_disk(bed: &Bed, disk: &std::path::Path) -> Offer {
    let view = bed.view(0).await;
    Offer {
        id: Uuid::new_v4(),
        from: "alpha".into(),
        spec: vmferry_agent::api::types::VmSpec {
            name: "web2".into(),
            argv: view.argv.clone(),
            cwd: "/".into(),
            shared_ram: true,
            adopted: false,
        },
        ram_bytes: view.ram_bytes,
        machine: view.machine.expect("known"),
        accelerator: view.accelerator.expect("known"),
        running: true,
        disks: vec![disk.into()],
        disks_are_shared: false,
        setup: Setup::default(),
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
        ("/v1/vms/{name}/migration", "post"),
        ("/v1/vms/{name}/migration", "delete"),
        ("/v1/migrations", "get"),
        ("/v1/migrations/{id}/events", "get"),
        ("/v1/hello", "get"),
        ("/v1/incoming/check", "post"),
        ("/v1/incoming", "post"),
        ("/v1/incoming/{id}", "get"),
        ("/v1/incoming/{id}", "delete"),
        ("/v1/incoming/{id}/keep", "post"),
        ("/v1/incoming/{id}/commit", "post"),
        ("/v1/incoming/{id}/recover", "post"),
        ("/v1/link-trial", "post"),
    ] {
        assert!(paths[path][method]["responses"].is_object(), "{method} {path} is not described");
    }
    let described: usize = paths.values().map(|it| it.as_object().expect("methods").len()).sum();
    assert_eq!(described, 20, "a route is missing in this test");
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
    let url = |path: &str| format!("http://{}{path}", testbed.beta().address);
    let http = reqwest::Client::new();
    let reply = http.get(url("/v1/vms")).send().await.expect("answers");
    assert!(!reply.status().is_success(), "VMs are not for other agents to see");
    let problem: Problem = reply.json().await.expect("a problem");
    assert_eq!(problem.code, Code::BadRequest);
    for body in ["", "{}", "[1,2", "{\"id\": 5}"] {
        let request = http.post(url("/v1/incoming")).header("content-type", "application/json").body(body);
        let reply = request.send().await.expect("answers");
        assert!(reply.status().is_client_error(), "{body}: {}", reply.status());
    }
    let huge = http.post(url("/v1/incoming")).header("content-type", "application/json").body(vec![b'['; 64 << 20]);
    // Refused by an answer or by closing the connection: either way it is not taken.
    if let Ok(reply) = huge.send().await {
        assert!(reply.status().is_client_error(), "{}", reply.status());
    }
    let unknown = http.get(url(&format!("/v1/incoming/{}", Uuid::new_v4()))).send().await.expect("answers");
    assert!(!unknown.status().is_success());
    assert!(http.get(url("/v1/hello")).send().await.expect("still there").status().is_success());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_abandoned_can_never_be_prepared_or_committed_afterwards() {
    let bed = bed::start(options(), guest(Mode::Idle)).await;
    let http = reqwest::Client::new();
    let id = Uuid::new_v4();
    let url = |rest: &str| format!("http://{}/v1/incoming/{id}{rest}", bed.beta().address);
    let step = async |reply: reqwest::Response| {
        let state: serde_json::Value = reply.json().await.expect("a state");
        state["step"].as_str().map(str::to_owned)
    };
    let reply = http.delete(url("")).send().await.expect("answers");
    assert_eq!(step(reply).await.as_deref(), Some("abandoned"));
    let reply = http.post(url("/commit")).send().await.expect("answers");
    assert_eq!(step(reply).await.as_deref(), Some("abandoned"));
    let offer = Offer { id, disks: Vec::new(), ..offer_with_disk(&bed, "/nowhere".as_ref()).await };
    let prepare = format!("http://{}/v1/incoming", bed.beta().address);
    let reply = http.post(prepare).json(&offer).send().await.expect("answers");
    assert!(!reply.status().is_success());
    assert!(bed.beta().show("web2").await.expect("answers").is_none());
}
