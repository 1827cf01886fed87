//! What the documents say is so: the commands of the first migration are run as they are written there.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::bed::text;

const FIRST_MIGRATION: &str = include_str!("../docs/FIRST-MIGRATION.md");
const README: &str = include_str!("../README.md");
const MACHINES: &str = include_str!("../docs/MACHINES.md");
const SHARED: &str = "/srv/shared";

/// One machine of the document: folders and an address of its own.
struct Machine {
    dir: PathBuf,
    agent: Option<Child>,
}

/// Both machines; other addresses and another shared folder stand for those in the document.
struct Machines {
    dir: tempfile::TempDir,
    address: [String; 2],
    hosts: [Machine; 2],
}

impl Machines {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(dir.path().join("shared")).expect("created");
        // All of 127/8 is this host; another run of this test at the same time has other addresses.
        let net = std::process::id() % 250 + 1;
        let address = [format!("127.0.{net}.1"), format!("127.0.{net}.2")];
        let machine = |name: &str, address: &str| {
            let dir = dir.path().join(name);
            std::fs::create_dir(&dir).expect("created");
            let here = dir.display();
            let config = format!(
                "name = '{name}'\nrun_dir = '{here}/run'\nstate_dir = '{here}/state'\nlisten = '{address}:7420'\n"
            );
            std::fs::write(dir.join("agent.toml"), config).expect("written");
            Machine { dir, agent: None }
        };
        let hosts = [machine("alpha", &address[0]), machine("beta", &address[1])];
        Self { dir, address, hosts }
    }

    fn shell(&self, host: usize, line: &str) -> Command {
        let line = line
            .replace("192.0.2.1", &self.address[0])
            .replace("192.0.2.2", &self.address[1])
            .replace(SHARED, &self.dir.path().join("shared").display().to_string());
        let binary = Path::new(env!("CARGO_BIN_EXE_vmferry")).parent().expect("it is in a folder");
        let path = format!("{}:{}", binary.display(), std::env::var("PATH").expect("it is set"));
        let dir = &self.hosts[host].dir;
        let mut command = Command::new("sh");
        command
            .args(["-ec", &format!("exec {line}")])
            .env("PATH", path)
            .env("VMFERRY_CONFIG", dir.join("agent.toml"))
            .env("VMFERRY_SOCKET", dir.join("run/agent.sock"))
            .stdin(Stdio::null());
        command
    }

    fn run(&mut self, host: usize, line: &str) -> Output {
        if !line.starts_with("vmferry agent") {
            return self.shell(host, line).output().expect("there is a shell");
        }
        let log = std::fs::File::create(self.hosts[host].dir.join("agent.log")).expect("created");
        let agent = self.shell(host, line).stderr(log).spawn().expect("there is a shell");
        self.hosts[host].agent = Some(agent);
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let output = self.shell(host, "vmferry list").output().expect("there is a shell");
            if output.status.success() || Instant::now() > deadline {
                return output;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn logs(&self) -> String {
        let log = |machine: &Machine| std::fs::read_to_string(machine.dir.join("agent.log")).unwrap_or_default();
        self.hosts.iter().map(log).collect::<Vec<_>>().join("---\n")
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        for host in [0, 1] {
            // No VM is left when the commands worked; when they did not, an error here tells nothing new.
            let _ = self.shell(host, "vmferry stop web1 --force").output();
            if let Some(mut agent) = self.hosts[host].agent.take() {
                let _ = agent.kill();
                let _ = agent.wait();
            }
        }
    }
}

/// The commands of a document's console blocks, and on which host each is run.
pub(crate) fn commands(document: &str) -> Vec<(usize, &str)> {
    let prompts = [(0, "alpha# "), (1, "beta# ")];
    document
        .lines()
        .filter_map(|line| prompts.iter().find_map(|(host, prompt)| Some((*host, line.strip_prefix(prompt)?))))
        .collect()
}

#[test]
fn the_first_migration_works_as_it_is_written() {
    let mut machines = Machines::new();
    let commands = commands(FIRST_MIGRATION);
    assert!(commands.iter().filter(|(_, line)| line.starts_with("vmferry migrate ")).count() >= 3, "{commands:?}");
    let mut said = Vec::new();
    let mut token = String::new();
    for (host, line) in commands {
        let output = machines.run(host, &line.replace("TOKEN", &token));
        assert!(output.status.success(), "{line}\n{}\n{}", text(&output), machines.logs());
        if line == "vmferry pair" {
            let printed = String::from_utf8_lossy(&output.stdout).into_owned();
            token = printed.trim().strip_prefix("vmferry pair ").expect("a command to copy").into();
        }
        said.push((line, text(&output)));
    }
    let after = |command: &str| said.iter().find(|(line, _)| *line == command).map(|(_, said)| said.as_str());
    let lists: Vec<&str> = said.iter().filter(|(line, _)| *line == "vmferry list").map(|(_, it)| it.as_str()).collect();
    assert!(lists.len() == 2 && lists.iter().all(|list| list.contains("web1")), "{lists:?}");
    assert!(after("vmferry migrations").is_some_and(|it| it.contains("the guest runs on the destination")), "{said:?}");
    assert!(
        said.iter().any(|(line, it)| line.ends_with("--dry-run") && it.contains("nothing was touched")),
        "{said:?}"
    );
    let shared = std::fs::read_dir(machines.dir.path().join("shared")).expect("it is there").flatten();
    let shared: Vec<_> = shared.map(|file| file.file_name()).collect();
    assert_eq!(shared, ["web1.raw"], "something was left beside the disk");
    for host in [0, 1] {
        let left = machines.run(host, "vmferry show web1");
        assert!(text(&left).contains("no VM named web1"), "{}", text(&left));
    }
}

#[test]
fn the_readme_lists_the_commands_and_exit_codes_of_the_help() {
    let help = Command::new(env!("CARGO_BIN_EXE_vmferry")).arg("--help").output().expect("it runs");
    let help = String::from_utf8(help.stdout).expect("UTF-8");
    let codes: Vec<&str> = help.split("Exit codes:").nth(1).expect("they are there").lines().collect();
    let codes: Vec<(&str, &str)> = codes.iter().filter_map(|line| line.trim().split_once(' ')).collect();
    assert!(codes.len() >= 9, "{codes:?}");
    for (code, meaning) in codes {
        assert!(README.contains(&format!("| {code} | {} |", meaning.trim())), "{code} {meaning}");
    }
    for (_, line) in commands(README) {
        let command = line.split_whitespace().nth(1).expect("a command");
        assert!(help.contains(&format!("  {command} ")), "{line}");
    }
}

#[test]
fn every_row_of_what_goes_along_has_a_test_that_exists() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests");
    let files = std::fs::read_dir(folder).expect("readable").flatten().map(|file| file.path());
    let sources: String = files.filter_map(|file| std::fs::read_to_string(file).ok()).collect();
    let rows = MACHINES.lines().filter(|line| line.starts_with("| ")).skip(2);
    let tests: Vec<&str> = rows.filter_map(|row| row.split('|').nth(3).map(str::trim)).collect();
    assert!(tests.len() >= 30, "{tests:?}");
    for name in tests.into_iter().flat_map(|names| names.split(", ")) {
        assert!(sources.contains(&format!("async fn {name}()")), "there is no test {name}");
    }
}
