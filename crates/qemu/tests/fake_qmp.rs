//! The QMP client against a QEMU that is none: what no real one can be made to do on demand.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;
use vmferry_qemu::qmp::commands::{MigratePause, QueryMigrate, QueryStatus, Stop};
use vmferry_qemu::{MigrationStatus, Qmp, QmpError, RunState};

const SOON: Duration = Duration::from_secs(5);
const GREETING: &str =
    r#"{"QMP":{"version":{"qemu":{"micro":0,"minor":0,"major":99},"package":""},"capabilities":["oob"]}}"#;

/// The server's end after the greeting.
struct Server {
    lines: tokio::io::Lines<BufReader<OwnedReadHalf>>,
    writer: OwnedWriteHalf,
}

impl Server {
    fn new(stream: UnixStream) -> Self {
        let (reader, writer) = stream.into_split();
        Self { lines: BufReader::new(reader).lines(), writer }
    }

    async fn greet(&mut self) {
        self.greet_with(GREETING, r#"{"enable":["oob"]}"#).await;
    }

    async fn greet_with(&mut self, greeting: &str, arguments: &str) {
        self.say(greeting).await;
        let command = self.line().await.unwrap();
        assert_eq!(command["execute"], "qmp_capabilities");
        assert_eq!(command["arguments"], serde_json::from_str::<serde_json::Value>(arguments).unwrap());
        self.answer(command["id"].as_u64().unwrap(), "{}").await;
    }

    async fn say(&mut self, line: &str) {
        self.writer.write_all(format!("{line}\r\n").as_bytes()).await.unwrap();
    }

    async fn answer(&mut self, id: u64, reply: &str) {
        self.say(&format!(r#"{{"return":{reply},"id":{id}}}"#)).await;
    }

    async fn line(&mut self) -> Option<serde_json::Value> {
        let line = self.lines.next_line().await.ok()??;
        Some(serde_json::from_str(&line).unwrap())
    }

    async fn command(&mut self) -> Option<(String, u64)> {
        let command = self.line().await?;
        Some((command["execute"].as_str().unwrap().into(), command["id"].as_u64().unwrap()))
    }
}

/// A server that greets and then does as told; kept until the end of the test.
struct Fake {
    _dir: TempDir,
    path: PathBuf,
    server: JoinHandle<()>,
}

fn fake<F>(script: impl FnOnce(Server) -> F + Send + 'static) -> Fake
where
    F: Future<Output = ()> + Send,
{
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = tokio::spawn(async move { script(Server::new(listener.accept().await.unwrap().0)).await });
    Fake { _dir: dir, path, server }
}

#[tokio::test]
async fn what_a_newer_qemu_adds_is_taken_or_ignored() {
    let fake = fake(|mut server| async move {
        server.greet().await;
        while let Some((name, id)) = server.command().await {
            match name.as_str() {
                "query-status" => {
                    server.say(r#"{"event":"GUEST_SNEEZED","data":{"how":"loudly"},"timestamp":{"seconds":1}}"#).await;
                    server.say(r#"{"event":"MIGRATION","data":{"status":"teleporting"}}"#).await;
                    server.say(r#"{"news":"of no known kind"}"#).await;
                    server.say("").await;
                    server.answer(id, r#"{"running":true,"status":"dreaming","mood":["good"]}"#).await;
                }
                "query-migrate" => {
                    let reply = r#"{"status":"active","ram":{"total":7,"new-figure":{}},"socket-address":[
                        {"type":"inet","host":"::","port":"4444","keep-alive":true},{"type":"quantum","pair":3}]}"#;
                    server.answer(id, &reply.replace('\n', " ")).await;
                }
                _ => server.answer(id, r#"{"surprise":1}"#).await,
            }
        }
    });
    let qmp = Qmp::connect(&fake.path, SOON).await.unwrap();
    let mut events = qmp.events();
    let status = qmp.execute(QueryStatus {}).await.unwrap();
    assert_eq!((status.running, status.status), (true, RunState::Other("dreaming".into())));
    assert_eq!(events.next().await.unwrap().data["how"], "loudly");
    let migration = events.next().await.unwrap().as_migration_status();
    assert_eq!(migration, Some(MigrationStatus::Other("teleporting".into())));
    let info = qmp.execute(QueryMigrate {}).await.unwrap();
    assert_eq!((info.status, info.ram.unwrap().total), (Some(MigrationStatus::Active), 7));
    let addresses = info.socket_address.unwrap();
    assert_eq!((addresses[0].tcp_port(), addresses[1].tcp_port()), (Some(4444), None));
    qmp.execute(Stop {}).await.unwrap();
}

#[tokio::test]
async fn replies_find_their_commands_in_any_order() {
    let fake = fake(|mut server| async move {
        server.greet().await;
        let mut asked = Vec::new();
        for _ in 0..7 {
            asked.push(server.command().await.unwrap());
        }
        for (name, id) in asked.into_iter().rev() {
            server.answer(id, &format!("\"{name}\"")).await;
        }
    });
    let qmp = Qmp::connect(&fake.path, SOON).await.unwrap();
    let commands = (0..7).map(|number| {
        let qmp = qmp.clone();
        tokio::spawn(async move {
            let name = format!("command-{number}");
            assert_eq!(qmp.execute_raw(&name, serde_json::json!({})).await.unwrap(), name);
        })
    });
    for command in commands.collect::<Vec<_>>() {
        command.await.unwrap();
    }
}

#[tokio::test]
async fn a_command_that_is_not_answered_times_out_and_the_next_one_works() {
    let fake = fake(|mut server| async move {
        server.greet().await;
        let (_, ignored) = server.command().await.unwrap();
        let (_, id) = server.command().await.unwrap();
        server.answer(ignored, "{}").await;
        server.answer(id, r#"{"running":false,"status":"paused"}"#).await;
        server.command().await;
    });
    let qmp = Qmp::connect(&fake.path, SOON).await.unwrap();
    let begun = Instant::now();
    let error = qmp.execute_within(Stop {}, Duration::from_millis(100)).await.unwrap_err();
    assert!(matches!(&error, QmpError::Timeout { command, .. } if command == "stop"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(2));
    assert_eq!(qmp.execute(QueryStatus {}).await.unwrap().status, RunState::Paused);
}

#[tokio::test]
async fn a_refusal_carries_qemus_words() {
    let fake = fake(|mut server| async move {
        server.greet().await;
        let (_, id) = server.command().await.unwrap();
        server.say(&format!(r#"{{"id":{id},"error":{{"class":"GenericError","desc":"not today"}}}}"#)).await;
        let (_, id) = server.command().await.unwrap();
        server.answer(id, r#"{"status":7}"#).await;
    });
    let qmp = Qmp::connect(&fake.path, SOON).await.unwrap();
    let error = qmp.execute(Stop {}).await.unwrap_err();
    assert_eq!(error.to_string(), "QEMU refused stop: not today");
    let error = qmp.execute(QueryStatus {}).await.unwrap_err();
    assert!(matches!(&error, QmpError::Reply { command, .. } if command == "query-status"), "{error}");
}

#[tokio::test]
async fn a_connection_that_ends_in_the_middle_of_a_reply_fails_the_command_and_all_later_ones() {
    let fake = fake(|mut server| async move {
        server.greet().await;
        server.command().await.unwrap();
        server.writer.write_all(br#"{"return": {"running": tr"#).await.unwrap();
    });
    let qmp = Qmp::connect(&fake.path, SOON).await.unwrap();
    let mut events = qmp.events();
    assert!(!qmp.is_closed());
    let error = qmp.execute(QueryStatus {}).await.unwrap_err();
    assert!(matches!(error, QmpError::Closed), "{error}");
    tokio::time::timeout(SOON, qmp.closed()).await.unwrap();
    assert!(qmp.is_closed());
    assert!(matches!(qmp.execute(Stop {}).await, Err(QmpError::Closed)));
    assert!(events.next().await.is_none());
    assert!(qmp.events().next().await.is_none(), "asking for events later changes nothing");
}

#[tokio::test]
async fn what_is_not_qmp_ends_the_connection_with_a_reason() {
    let fake = fake(|mut server| async move {
        server.greet().await;
        server.command().await.unwrap();
        server.say("Segmentation fault").await;
        server.command().await;
    });
    let qmp = Qmp::connect(&fake.path, SOON).await.unwrap();
    let error = qmp.execute(Stop {}).await.unwrap_err();
    assert!(error.to_string().contains("Segmentation fault"), "{error}");
    assert!(qmp.is_closed());
}

#[tokio::test]
async fn a_line_without_end_is_cut_off() {
    let fake = fake(|mut server| async move {
        server.greet().await;
        server.command().await.unwrap();
        let piece = vec![b' '; 1 << 20];
        for _ in 0..80 {
            if server.writer.write_all(&piece).await.is_err() {
                return;
            }
        }
        panic!("80 MiB without an end of line were taken");
    });
    let qmp = Qmp::connect(&fake.path, SOON).await.unwrap();
    let error = qmp.execute(Stop {}).await.unwrap_err();
    assert!(error.to_string().contains("longer than 64 MiB"), "{error}");
    fake.server.await.unwrap();
}

#[tokio::test]
async fn a_reader_of_events_that_sleeps_loses_the_oldest_and_blocks_nobody() {
    let fake = fake(|mut server| async move {
        server.greet().await;
        let (_, id) = server.command().await.unwrap();
        for number in 0..5000 {
            server.say(&format!(r#"{{"event":"E","data":{number}}}"#)).await;
        }
        server.answer(id, "{}").await;
    });
    let qmp = Qmp::connect(&fake.path, SOON).await.unwrap();
    let mut events = qmp.events();
    qmp.execute(Stop {}).await.unwrap();
    let first = events.next().await.unwrap().data.as_u64().unwrap();
    assert!(first > 0, "some were lost");
    let mut last = first;
    while let Some(event) = events.next().await {
        last += 1;
        assert_eq!(event.data, last, "and none after");
    }
    assert_eq!(last, 4999);
}

#[tokio::test]
async fn a_socket_that_comes_later_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp.sock");
    let server = tokio::spawn({
        let path = path.clone();
        async move {
            // First nothing, then a socket that refuses, as it is while QEMU starts.
            tokio::time::sleep(Duration::from_millis(30)).await;
            drop(UnixListener::bind(&path).unwrap());
            tokio::time::sleep(Duration::from_millis(30)).await;
            std::fs::remove_file(&path).unwrap();
            let listener = UnixListener::bind(&path).unwrap();
            let mut server = Server::new(listener.accept().await.unwrap().0);
            server.greet().await;
            server.command().await
        }
    });
    let qmp = Qmp::connect(&path, SOON).await.unwrap();
    drop(qmp);
    assert_eq!(server.await.unwrap(), None, "dropping the last clone ends the connection");
}

#[tokio::test]
async fn nobody_there_and_nobody_who_greets_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp.sock");
    let short = Duration::from_millis(80);
    assert!(matches!(Qmp::connect(&path, short).await, Err(QmpError::Connect { .. })));
    let _listener = UnixListener::bind(&path).unwrap();
    assert!(matches!(Qmp::connect(&path, short).await, Err(QmpError::NoGreeting { .. })));
}

#[tokio::test]
async fn what_must_be_done_at_once_overtakes_what_qemu_cannot_do() {
    // It answers nothing that waits its turn; a real one stops reading when eight of those wait.
    let fake = fake(|mut server| async move {
        server.greet().await;
        let mut unanswered = 0;
        while let Some(command) = server.line().await {
            if command["exec-oob"] == "migrate-pause" {
                server.answer(command["id"].as_u64().unwrap(), "{}").await;
                return;
            }
            unanswered += 1;
            assert!(unanswered < 8, "{command}");
        }
    });
    let qmp = Qmp::connect(&fake.path, SOON).await.unwrap();
    for _ in 0..12 {
        let error = qmp.execute_within(QueryStatus {}, Duration::from_millis(5)).await.unwrap_err();
        assert!(matches!(error, QmpError::Timeout { .. }), "{error:?}");
    }
    qmp.execute_within(MigratePause {}, SOON).await.unwrap();
    fake.server.await.unwrap();
}

#[tokio::test]
async fn a_monitor_that_does_everything_in_order_gets_everything_in_order() {
    let fake = fake(|mut server| async move {
        server.greet_with(&GREETING.replace(r#""oob""#, r#""telepathy""#), "null").await;
        let (name, id) = server.command().await.unwrap();
        assert_eq!(name, "migrate-pause");
        server.answer(id, "{}").await;
    });
    let qmp = Qmp::connect(&fake.path, SOON).await.unwrap();
    qmp.execute(MigratePause {}).await.unwrap();
    fake.server.await.unwrap();
}
