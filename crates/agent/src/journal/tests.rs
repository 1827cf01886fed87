use super::*;

use vmferry_api::VmSpec;
use vmferry_custody::InStep;
use vmferry_custody::source::{OutEnd, OutStep, Row};

fn journal() -> (tempfile::TempDir, Journal) {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    (dir, journal)
}

fn open(dir: &Path) -> Journal {
    Journal::open(dir).unwrap().journal
}

fn source() -> Source {
    Source { name: "alpha".into(), key: Fingerprint::of(b"alpha") }
}

fn instance(pid: u32) -> Instance {
    Instance::now(pid, 7)
}

fn out(id: Uuid, pid: u32) -> OutRecord {
    OutRecord {
        id,
        vm: "web1".into(),
        instance: instance(pid),
        peer: "beta".into(),
        address: "192.0.2.2:7420".into(),
        peer_key: Fingerprint::of(b"beta"),
        running: true,
        step: OutStep::CopyRam,
    }
}

fn vm(pid: u32) -> VmRecord {
    let spec = VmSpec {
        name: "web1".into(),
        argv: vec![],
        cwd: "/".into(),
        shared_ram: false,
        adopted: false,
        measuring: false,
        io_limits: None,
    };
    VmRecord {
        spec,
        instance: instance(pid),
        qmp: String::new(),
        accelerator: "tcg".into(),
        incoming: None,
        autostart: false,
        ended: None,
        changed: None,
    }
}

const BEGUN: Row = Row::Open(OutStep::CopyRam);

async fn commit(journal: &Journal, id: Uuid) -> bool {
    journal.write_in(id, "web1", &source(), InStep::Committed { must_run: true }, "", false).await.unwrap()
}

async fn prepare(journal: &Journal, id: Uuid) -> bool {
    journal.write_in(id, "web1", &source(), InStep::Prepared, "", false).await.unwrap()
}

async fn abandon(journal: &Journal, id: Uuid, why: &str) -> bool {
    journal.write_in(id, "web1", &source(), InStep::Abandoned, why, false).await.unwrap()
}

async fn step(journal: &Journal, id: Uuid) -> Option<InStep> {
    journal.row_in(id).await.unwrap().map(|row| row.step)
}

#[tokio::test]
async fn a_step_is_found_again_by_the_next_agent() {
    let (dir, journal) = journal();
    let id = Uuid::new_v4();
    journal.write_out(&out(id, 1), BEGUN, "").await.unwrap();
    journal.write_out(&out(id, 1), Row::Open(OutStep::Commit), "").await.unwrap();
    let found = open(dir.path()).open_out().await.unwrap();
    assert_eq!((found.len(), found[0].step, found[0].running), (1, OutStep::Commit, true));
    assert_eq!(found[0].instance, instance(1));
}

#[tokio::test]
async fn an_instance_has_one_open_migration_and_another_of_that_name_its_own() {
    let (_dir, journal) = journal();
    let (first, second, other) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
    journal.write_out(&out(first, 1), BEGUN, "").await.unwrap();
    assert!(journal.write_out(&out(second, 1), BEGUN, "").await.is_err(), "one is open");
    journal.write_out(&out(other, 2), BEGUN, "").await.unwrap();
    journal.write_out(&out(first, 1), Row::Ended(OutEnd::Abandoned), "cancelled").await.unwrap();
    journal.write_out(&out(second, 1), BEGUN, "").await.unwrap();
    let open: Vec<Uuid> = journal.open_out().await.unwrap().into_iter().map(|it| it.id).collect();
    assert_eq!(open.len(), 2);
    assert!(open.contains(&second) && open.contains(&other));
    let all = journal.last_out(5).await.unwrap();
    assert!(all.iter().any(|it| it.id == first && it.outcome.as_deref() == Some("cancelled")));
}

#[tokio::test]
async fn what_was_abandoned_is_never_committed_and_the_first_reason_is_kept() {
    let (_dir, journal) = journal();
    let id = Uuid::new_v4();
    assert!(prepare(&journal, id).await);
    assert!(abandon(&journal, id, "its lease ran out").await);
    assert!(!commit(&journal, id).await);
    assert!(!abandon(&journal, id, "late").await);
    let row = journal.row_in(id).await.unwrap().unwrap();
    assert_eq!((row.step, row.why.as_deref()), (InStep::Abandoned, Some("its lease ran out")));
}

#[tokio::test]
async fn what_was_committed_is_abandoned_only_by_one_who_knows_it() {
    let (_dir, journal) = journal();
    let id = Uuid::new_v4();
    assert!(prepare(&journal, id).await && commit(&journal, id).await);
    assert!(!abandon(&journal, id, "late").await);
    assert_eq!(step(&journal, id).await, Some(InStep::Committed { must_run: true }));
    let ran = InStep::Committed { must_run: false };
    assert!(journal.write_in(id, "web1", &source(), ran, "", false).await.unwrap());
    assert_eq!(step(&journal, id).await, Some(ran));
    assert!(journal.write_in(id, "web1", &source(), InStep::Abandoned, "kept there", true).await.unwrap());
    assert_eq!(step(&journal, id).await, Some(InStep::Abandoned));
}

#[tokio::test]
async fn what_was_never_heard_of_cannot_be_committed_and_once_abandoned_not_begun() {
    let (_dir, journal) = journal();
    let id = Uuid::new_v4();
    assert!(!commit(&journal, id).await);
    assert!(abandon(&journal, id, "never heard of it").await);
    assert!(!prepare(&journal, id).await);
    assert!(!commit(&journal, id).await);
}

#[tokio::test]
async fn what_is_kept_here_is_remembered_until_the_destination_has_let_go() {
    let (dir, journal) = journal();
    let id = Uuid::new_v4();
    journal.write_out(&out(id, 1), BEGUN, "").await.unwrap();
    journal.write_out(&out(id, 1), Row::Open(OutStep::KeptHere), "").await.unwrap();
    journal.write_out(&out(id, 1), Row::Ended(OutEnd::Abandoned), "kept here").await.unwrap();
    let journal = open(dir.path());
    assert_eq!(journal.fences().await.unwrap().iter().map(|it| it.id).collect::<Vec<_>>(), [id]);
    journal.drop_fence(id).await.unwrap();
    assert!(journal.fences().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_vm_is_forgotten_only_as_the_instance_that_it_is() {
    let (_dir, journal) = journal();
    journal.put_vm(&vm(2)).await.unwrap();
    journal.remove_vm("web1", &instance(1)).await.unwrap();
    assert_eq!(journal.vms().await.unwrap().len(), 1, "that was another one");
    journal.remove_vm("web1", &instance(2)).await.unwrap();
    assert!(journal.vms().await.unwrap().is_empty());
}

#[tokio::test]
async fn one_record_that_cannot_be_read_keeps_no_other_from_being_found() {
    let (_dir, journal) = journal();
    journal.put_vm(&vm(1)).await.unwrap();
    let broken = VmRecord { spec: VmSpec { name: "broken".into(), ..vm(1).spec }, ..vm(9) };
    journal.put_vm(&broken).await.unwrap();
    let damage = |db: &mut Connection| db.execute("UPDATE vms SET spec = '{' WHERE name = 'broken'", []);
    journal.call(damage).await.unwrap();
    let names: Vec<String> = journal.vms().await.unwrap().into_iter().map(|it| it.spec.name).collect();
    assert_eq!(names, ["web1"]);
}

#[tokio::test]
async fn a_damaged_journal_is_kept_aside_and_a_new_one_begun() {
    let (dir, journal) = journal();
    journal.put_vm(&vm(1)).await.unwrap();
    drop(journal);
    // Its thread ends with it, and closes the file.
    std::thread::sleep(std::time::Duration::from_millis(200));
    for end in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(dir.path().join(format!("agent.db{end}")));
    }
    std::fs::write(dir.path().join("agent.db"), b"this is no database, by any means whatsoever").unwrap();
    let opened = Journal::open(dir.path()).unwrap();
    let (aside, _) = opened.set_aside.expect("it was damaged");
    assert!(std::fs::read(aside).unwrap().starts_with(b"this is no database"));
    assert!(opened.journal.vms().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_journal_of_a_newer_version_is_refused_and_left_as_it_is() {
    let (dir, journal) = journal();
    journal.call(|db| db.pragma_update(None, "user_version", 99)).await.unwrap();
    let Err(error) = Journal::open(dir.path()) else { panic!("opened") };
    assert!(error.to_string().contains("newer vmferry"), "{error}");
}

#[tokio::test]
async fn a_journal_of_an_earlier_version_keeps_what_was_open() {
    let dir = tempfile::tempdir().unwrap();
    schema::make_version_2(dir.path());
    let journal = open(dir.path());
    let mut open = journal.open_out().await.unwrap();
    open.sort_by_key(|it| it.instance.pid);
    let found: Vec<_> = open.iter().map(|it| (it.instance.pid, it.instance.start_time, it.step)).collect();
    assert_eq!(found, [(41, 5, OutStep::Commit), (42, 6, OutStep::Stranded)]);
    let last = journal.last_out(9).await.unwrap();
    assert!(last.iter().any(|it| it.outcome.as_deref() == Some("left open by an earlier version")), "{last:?}");
}

/// A file system of its own, so small that it is full at once.
struct Small(tempfile::TempDir);

impl Small {
    fn new() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=4m", "none"]).arg(dir.path());
        mount.output().ok()?.status.success().then_some(Self(dir))
    }

    fn fill(&self) {
        let mut file = std::fs::File::create(self.0.path().join("full")).unwrap();
        while std::io::Write::write_all(&mut file, &[7; 4096]).is_ok() {}
        let mut file = std::fs::File::create(self.0.path().join("fuller")).unwrap();
        while std::io::Write::write_all(&mut file, &[7; 1]).is_ok() {}
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // What is not unmounted is seen by whoever looks at the machine.
        let _ = std::process::Command::new("umount").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn a_full_disk_refuses_a_migration_and_keeps_none_that_has_begun_from_its_end() {
    let Some(small) = Small::new() else {
        eprintln!("not run: only root can mount a small file system");
        return;
    };
    let journal = open(small.0.path());
    journal.reserve().await.unwrap();
    let (leaving, coming) = (Uuid::new_v4(), Uuid::new_v4());
    journal.write_out(&out(leaving, 1), BEGUN, "").await.unwrap();
    assert!(prepare(&journal, coming).await);
    small.fill();
    for step in [OutStep::Commit, OutStep::PostCopy, OutStep::Retire] {
        journal.write_out(&out(leaving, 1), Row::Open(step), "").await.unwrap();
    }
    journal.write_out(&out(leaving, 1), Row::Ended(OutEnd::Done), "it runs there").await.unwrap();
    assert!(commit(&journal, coming).await);
    // And what goes on beyond what was taken fails in the end, rather than seeming to be written.
    let mut refused = false;
    for _ in 0..2000 {
        let id = Uuid::new_v4();
        let begun = journal.write_out(&out(id, 2), BEGUN, "").await;
        if begun.is_err() {
            refused = true;
            break;
        }
        assert!(journal.open_out().await.unwrap().iter().any(|it| it.id == id));
        let _ = journal.write_out(&out(id, 2), Row::Ended(OutEnd::Abandoned), &"over ".repeat(1000)).await;
    }
    assert!(refused && journal.reserve().await.is_err(), "a full disk is told");
}

fn peer(name: &str, key: &[u8]) -> PeerRecord {
    PeerRecord { name: name.into(), fingerprint: Fingerprint::of(key), address: String::new(), paired: 0 }
}

#[tokio::test]
async fn a_token_is_used_once() {
    let (_dir, journal) = journal();
    journal.add_token("hash", 60).await.unwrap();
    assert_eq!(journal.join("other", &peer("alpha", b"a")).await.unwrap(), Joined::NoToken);
    assert_eq!(journal.join("hash", &peer("alpha", b"a")).await.unwrap(), Joined::Yes);
    assert_eq!(journal.join("hash", &peer("mallory", b"m")).await.unwrap(), Joined::NoToken);
    let names: Vec<String> = journal.peers().await.unwrap().into_iter().map(|peer| peer.name).collect();
    assert_eq!(names, ["alpha"]);
}

#[tokio::test]
async fn a_token_that_has_expired_is_worth_nothing() {
    let (_dir, journal) = journal();
    journal.add_token("hash", 0).await.unwrap();
    assert_eq!(journal.join("hash", &peer("alpha", b"a")).await.unwrap(), Joined::NoToken);
}

#[tokio::test]
async fn a_name_belongs_to_one_peer_until_it_is_unpaired() {
    let (_dir, journal) = journal();
    assert!(journal.put_peer(&peer("alpha", b"a")).await.unwrap());
    journal.add_token("hash", 60).await.unwrap();
    assert_eq!(journal.join("hash", &peer("alpha", b"m")).await.unwrap(), Joined::NameTaken);
    assert_eq!(journal.peer(Fingerprint::of(b"m")).await.unwrap(), None);
    journal.remove_peer(Fingerprint::of(b"a")).await.unwrap();
    assert_eq!(journal.join("hash", &peer("alpha", b"m")).await.unwrap(), Joined::Yes, "the token was not used up");
    assert!(journal.peer(Fingerprint::of(b"m")).await.unwrap().is_some());
}

#[tokio::test]
async fn a_peer_may_change_its_name_and_address() {
    let (_dir, journal) = journal();
    assert!(journal.put_peer(&peer("alpha", b"a")).await.unwrap());
    let moved = PeerRecord { address: "192.0.2.9:7420".into(), ..peer("gamma", b"a") };
    assert!(journal.put_peer(&moved).await.unwrap());
    let known = journal.peers().await.unwrap();
    assert_eq!((known.len(), known[0].name.as_str(), known[0].address.as_str()), (1, "gamma", "192.0.2.9:7420"));
}

fn coming(id: Uuid, from: &[u8]) -> MoveIn {
    let coming = Coming { spec: vm(0).spec, autostart: true, accelerator: "tcg".into(), disks: Vec::new() };
    MoveIn { id, source: Source { name: "alpha".into(), key: Fingerprint::of(from) }, coming, taken: false }
}

#[tokio::test]
async fn a_vm_that_comes_is_taken_once_or_given_up_and_its_name_is_its_own() {
    let (dir, journal) = journal();
    let [first, second] = [Uuid::new_v4(), Uuid::new_v4()];
    assert!(journal.vm_arrives(&coming(first, b"alpha")).await.unwrap());
    assert!(!journal.vm_arrives(&coming(second, b"gamma")).await.unwrap(), "its name is expected from elsewhere");
    // The same host begins anew, with the same move or another.
    assert!(journal.vm_arrives(&coming(first, b"alpha")).await.unwrap());
    assert!(journal.vm_arrives(&coming(second, b"alpha")).await.unwrap());
    let record = coming(second, b"alpha").record(dir.path());
    assert!(!journal.take_vm(first, &record).await.unwrap(), "nobody expects that any more");
    assert!(journal.vms().await.unwrap().is_empty());
    assert!(journal.take_vm(second, &record).await.unwrap());
    assert!(!journal.take_vm(second, &record).await.unwrap() && !journal.give_up_vm(second).await.unwrap());
    assert!(journal.vms().await.unwrap()[0].autostart && journal.moves_in().await.unwrap().is_empty());
    // Another agent knows that it was.
    drop(journal);
    let journal = open(dir.path());
    assert!(journal.move_in(second).await.unwrap().unwrap().taken);
    assert!(!journal.vm_arrives(&coming(first, b"alpha")).await.unwrap(), "there is a VM of that name");
    assert!(journal.give_up_vm(first).await.is_ok_and(|was_there| !was_there));
}

#[tokio::test]
async fn a_vm_that_is_given_away_stays_on_record_until_it_is_there() {
    let (dir, journal) = journal();
    journal.put_vm(&vm(1)).await.unwrap();
    let given = MoveOut {
        id: Uuid::new_v4(),
        vm: "web1".into(),
        instance: instance(1),
        peer: "beta".into(),
        peer_key: Fingerprint::of(b"beta"),
        address: "192.0.2.2:7420".into(),
        disks: vec!["/a".into()],
        done: false,
    };
    journal.give_vm(&given).await.unwrap();
    assert!(journal.give_vm(&MoveOut { id: Uuid::new_v4(), ..given.clone() }).await.is_err(), "it is given once");
    journal.vm_is_back(given.id).await.unwrap();
    assert!(journal.moves_out().await.unwrap().is_empty() && journal.vms().await.unwrap().len() == 1);
    journal.give_vm(&given).await.unwrap();
    drop(journal);
    let journal = open(dir.path());
    assert_eq!(journal.moves_out().await.unwrap()[0].disks, given.disks);
    assert_eq!(journal.vms().await.unwrap().len(), 1);
    journal.vm_is_there(&given).await.unwrap();
    assert!(journal.vms().await.unwrap().is_empty() && journal.moves_out().await.unwrap().is_empty());
    assert!(journal.last_move_out("web1").await.unwrap().is_some_and(|it| it.done && it.peer == "beta"));
    assert!(journal.last_move_out("web2").await.unwrap().is_none());
}
