//! From a VM's own command line to the one that is run: what we need is added, what would tie QEMU to a terminal is led
//! to a socket, and everything else stays as it was written.

use std::net::TcpListener;
use std::os::fd::RawFd;
use std::path::Path;

use crate::command_line::{CommandLine, CommandLineError, CommandOption, Properties, SPICE_PORTS, escape_commas};
use crate::host::Accel;

/// The ids of what we add.
const QMP: &str = "vmferry-qmp";
const CONSOLE: &str = "vmferry-console";
const RAM: &str = "vmferry-ram";
/// And a number.
const LOG: &str = "vmferry-log-";

/// So many displays after the one that was asked for are tried.
const OTHER_DISPLAYS: u16 = 99;
/// Ports of the guest that may write to a file.
const LOGGED: [&str; 3] = ["serial", "parallel", "debugcon"];

/// What will be run, and what the user should know about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchPlan {
    /// The command line; the first word is the binary as the user gave it.
    pub argv: Vec<String>,
    /// One plain sentence each.
    pub notes: Vec<String>,
    /// A serial port of the guest is on `console.sock`.
    pub console: bool,
    /// The guest's accelerator, by QEMU's word.
    pub accelerator: String,
}

/// What a launch is planned for.
#[derive(Clone, Debug)]
pub struct LaunchSettings<'a> {
    /// The VM's name.
    pub name: &'a str,
    /// A folder that exists; gets `qmp.sock`, `console.sock`, `qemu.pid` and `qemu.log`.
    pub run_dir: &'a Path,
    /// What the host can do.
    pub accel: Accel,
    /// Put the guest's RAM into this file of the caller's ([`guest_ram`](super::guest_ram)), where the command line leaves that open; QEMU inherits the
    /// descriptor. Source and destination must agree: the RAM has another name in the migration then.
    ///
    /// It is given to QEMU as a file with a path, since QEMU 8.1 and newer leave only such RAM out of a migration
    /// (`x-ignore-shared`), and not memory that they made themselves.
    pub shared_ram: Option<RawFd>,
    /// It waits for a guest.
    pub incoming: Option<Incoming>,
}

/// What a QEMU that waits for a guest must be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incoming {
    /// The exact machine type of the source, such as `pc-q35-7.2`: `q35` means another machine in every version.
    pub machine_type: String,
}

/// The command line asks for RAM by `-m` alone, or not at all, so what it lies in may be chosen.
pub fn wants_shared_ram(command: &CommandLine) -> bool {
    let names_a_backend = command.all("machine").any(|option| option.properties().get("memory-backend").is_some());
    // A backend that is named nowhere else is that of a DIMM.
    !(names_a_backend || command.has("numa") || command.has("mem-path"))
}

/// The command line that a VM was launched with, from that of its QEMU: what a plan of ours has added is taken out again,
/// as it would not be right anywhere else. Tells also whether its RAM was put into a file of ours. Another QEMU's stays as it is.
pub fn without_ours(command: &CommandLine) -> (Vec<String>, bool) {
    let is = |option: &CommandOption, key: &str, value: &str| option.properties().get(key) == Some(value);
    let ours = command.all("chardev").find(|option| is(option, "id", QMP));
    let path = ours.and_then(|option| Some(option.properties().get("path")?.to_owned()));
    let Some(dir) = path.as_deref().and_then(|path| Path::new(path).parent()) else {
        return (command.argv(), false);
    };
    let console = dir.join("console.sock").display().to_string();
    let (mut argv, mut shared_ram) = (vec![command.binary().to_owned()], false);
    let log_of = |id: &str| {
        let log = command.all("chardev").find(|option| is(option, "id", id) && id.starts_with(LOG))?;
        Some(log.properties().get("path")?.to_owned())
    };
    for option in command.options() {
        match option.name.as_str() {
            "chardev" if is(option, "id", QMP) || is(option, "id", CONSOLE) => {}
            "chardev" if option.properties().get("id").is_some_and(|id| id.starts_with(LOG)) => {}
            "chardev" if is(option, "path", &console) => {
                let mut rest = option.properties();
                for key in ["path", "server", "wait"] {
                    rest.remove(key);
                }
                rest.put_first("backend", "stdio");
                argv.extend([option.words[0].clone(), rest.to_string()]);
            }
            "mon" if is(option, "chardev", QMP) => {}
            "pidfile" => {}
            "object" if is(option, "id", RAM) => shared_ram = true,
            "machine" if is(option, "memory-backend", RAM) => {}
            "serial" if option.value() == format!("chardev:{CONSOLE}") => {
                argv.extend([option.words[0].clone(), "stdio".into()]);
            }
            name => match option.value().strip_prefix("chardev:").and_then(log_of) {
                Some(path) if LOGGED.contains(&name) => argv.extend([option.words[0].clone(), format!("file:{path}")]),
                _ => argv.extend(option.words.iter().cloned()),
            },
        }
    }
    (argv, shared_ram)
}

/// The accelerator that a VM with this command line gets on a host that can do this, by QEMU's word.
pub fn chosen_accelerator(command: &CommandLine, host: &Accel) -> String {
    Accelerator::choose(command, host).name
}

/// Plans a launch.
pub fn plan_launch(command: &CommandLine, settings: &LaunchSettings<'_>) -> Result<LaunchPlan, CommandLineError> {
    match settings.incoming {
        Some(_) => command.check_incoming_runnable()?,
        None => command.check_runnable()?,
    }
    let mut planner = Planner {
        settings,
        argv: vec![command.binary().to_owned()],
        notes: Vec::new(),
        console: Console::of(command),
        accelerator: Accelerator::choose(command, &settings.accel),
        placed: false,
        logs: 0,
    };
    for option in command.options() {
        planner.take(option);
    }
    planner.add_ours(command)?;
    let accelerator = planner.accelerator.name;
    Ok(LaunchPlan { argv: planner.argv, notes: planner.notes, console: planner.placed, accelerator })
}

/// Who gets the console's socket. One only: a socket has one user inside QEMU.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Console {
    /// The first `-chardev stdio`, under its own id.
    Chardev,
    /// The first serial port that was to be on the terminal.
    Serial,
    /// The serial port that QEMU gives to a guest for which none was asked for.
    Default,
    Nobody,
}

impl Console {
    fn of(command: &CommandLine) -> Self {
        let has_serial = command.has("serial")
            || command.all("device").any(|option| option.properties().get("driver") == Some("isa-serial"));
        if command.all("chardev").any(is_stdio_chardev) {
            Self::Chardev
        } else if command.values("serial").any(is_stdio) {
            Self::Serial
        } else if has_serial || command.has("nodefaults") {
            Self::Nobody
        } else {
            Self::Default
        }
    }
}

fn is_stdio(backend: &str) -> bool {
    matches!(backend, "stdio" | "mon:stdio")
}

fn is_stdio_chardev(option: &CommandOption) -> bool {
    option.properties().get("backend") == Some("stdio")
}

/// The accelerator that will be used.
struct Accelerator {
    /// The argument of `-accel`; none to leave what the user wrote.
    option: Option<String>,
    /// KVM was wanted, or nothing was, and it does not work: `-cpu host` cannot be had then.
    without_kvm: bool,
    /// By QEMU's word.
    name: String,
}

impl Accelerator {
    fn choose(command: &CommandLine, host: &Accel) -> Self {
        let wanted = command.accelerators();
        // Where KVM emulates kernels, it is for those who want nothing else.
        let kvm_works = match host {
            Accel::Kvm(kvm) => !kvm.emulates_kernels || !wanted.is_empty() && wanted.iter().all(|name| *name == "kvm"),
            Accel::Tcg { .. } => false,
        };
        let usable = |name: &&&str| **name == "tcg" || (**name == "kvm" && kvm_works);
        let known = |name: &&str| matches!(*name, "tcg" | "kvm");
        let (chosen, without_kvm) = match wanted.first() {
            None if kvm_works => ("kvm", false),
            None => ("tcg", true),
            // Something else than KVM or TCG first: for QEMU to judge.
            Some(first) if !known(first) => {
                return Self { option: None, without_kvm: false, name: (*first).to_owned() };
            }
            Some(first) => match wanted.iter().find(usable) {
                Some(name) => (*name, *first == "kvm" && *name == "tcg"),
                None => ("tcg", true),
            },
        };
        let given = command.values("accel").find(|value| {
            let name = Properties::parse(value, Some("accel"));
            name.get("accel") == Some(chosen)
        });
        Self { option: Some(given.unwrap_or(chosen).to_owned()), without_kvm, name: chosen.to_owned() }
    }
}

struct Planner<'a> {
    settings: &'a LaunchSettings<'a>,
    argv: Vec<String>,
    notes: Vec<String>,
    console: Console,
    accelerator: Accelerator,
    /// The console has its user.
    placed: bool,
    /// How many files are gone on with.
    logs: u32,
}

impl Planner<'_> {
    fn add(&mut self, flag: &str, value: &str) {
        self.argv.extend([flag.to_owned(), value.to_owned()]);
    }

    fn path_in_run_dir(&self, file: &str) -> String {
        self.settings.run_dir.join(file).display().to_string()
    }

    /// Takes over one of the user's options, as it is or as it must be here.
    fn take(&mut self, option: &CommandOption) {
        let incoming = self.settings.incoming.is_some();
        match option.name.as_str() {
            "daemonize" => {}
            // Added again below, or replaced.
            "accel" | "enable-kvm" if self.accelerator.option.is_some() => {}
            "incoming" | "loadvm" | "S" if incoming => {}
            "pidfile" => self.notes.push(format!(
                "The pidfile is {} instead of the one given by -pidfile.",
                self.path_in_run_dir("qemu.pid")
            )),
            "machine" => self.take_machine(option),
            "cpu" => self.take_cpu(option),
            // What -nographic means to the guest: its firmware writes to the serial port.
            "nographic" => {
                self.add("-display", "none");
                self.add("-machine", "graphics=off");
            }
            "monitor" | "qmp" | "qmp-pretty" if is_stdio(option.value()) => {
                self.notes.push(format!("{} is left out: there is no terminal.", option.words.join(" ")));
            }
            "serial" if is_stdio(option.value()) => {
                let free = self.console == Console::Serial && !self.placed;
                let backend = if free { self.place_console(CONSOLE, "") } else { "null".into() };
                self.add("-serial", &backend);
            }
            "chardev" if is_stdio_chardev(option) => self.take_stdio_chardev(option),
            // A guest that arrives goes on with its logs: QEMU would begin them anew.
            "chardev" if incoming && option.properties().get("backend") == Some("file") => {
                let mut log = option.properties();
                log.remove("append");
                self.add("-chardev", &format!("{log},append=on"));
            }
            // A display whose port is taken gets another.
            name @ ("vnc" | "display") if incoming => {
                match option.vnc_display().filter(|_| option.properties().get("to").is_none()) {
                    Some(number) => {
                        let value = format!("{},to={}", option.value(), number + OTHER_DISPLAYS);
                        self.add(&format!("-{name}"), &value);
                    }
                    None => self.argv.extend(option.words.iter().cloned()),
                }
            }
            // Which QEMU does by itself for VNC only.
            "spice" if incoming => self.take_spice(option),
            name if incoming && LOGGED.contains(&name) && option.value().starts_with("file:") => {
                let path = escape_commas(option.value().trim_start_matches("file:"));
                let id = format!("{LOG}{}", self.logs);
                self.logs += 1;
                self.add("-chardev", &format!("file,id={id},path={path},append=on"));
                self.add(&format!("-{name}"), &format!("chardev:{id}"));
            }
            _ => self.argv.extend(option.words.iter().cloned()),
        }
    }

    fn take_spice(&mut self, option: &CommandOption) {
        let mut spice = option.properties();
        let address = spice.get_some("addr").unwrap_or("0.0.0.0").to_owned();
        // Until all are chosen.
        let mut held = Vec::new();
        for key in SPICE_PORTS {
            let mut is_free = |port: &u16| TcpListener::bind((address.as_str(), *port)).map(|it| held.push(it)).is_ok();
            if let Some(asked) = option.spice_port(key)
                && let Some(port) = (asked..=asked.saturating_add(OTHER_DISPLAYS)).find(&mut is_free)
            {
                spice.remove(key);
                spice.push(key, &port.to_string());
            }
        }
        self.add("-spice", &spice.to_string());
    }

    fn take_machine(&mut self, option: &CommandOption) {
        let mut machine = option.properties();
        let written = machine.clone();
        if self.accelerator.option.is_some() {
            machine.remove("accel");
        }
        if self.settings.incoming.is_some() {
            machine.remove("type");
        }
        if machine == written {
            self.argv.extend(option.words.iter().cloned());
        } else if !machine.is_empty() {
            self.add("-machine", &machine.to_string());
        }
    }

    fn take_cpu(&mut self, option: &CommandOption) {
        let (model, features) = option.value().split_once(',').unwrap_or((option.value(), ""));
        let features = if features.is_empty() { String::new() } else { format!(",{features}") };
        match (model, &self.settings.accel) {
            ("host", _) if self.accelerator.without_kvm => self.add("-cpu", &format!("max{features}")),
            ("host" | "max", Accel::Kvm(kvm)) if self.accelerator.name == "kvm" && !kvm.host_cpu.is_empty() => {
                self.add("-cpu", &format!("{}{features}{}", model, kvm.host_cpu));
            }
            _ => self.argv.extend(option.words.iter().cloned()),
        }
    }

    /// The socket takes the place of the terminal; who uses it by its id does not notice.
    fn take_stdio_chardev(&mut self, option: &CommandOption) {
        let mut rest = option.properties();
        let id = rest.get("id").unwrap_or_default().to_owned();
        for key in ["backend", "id", "signal"] {
            rest.remove(key);
        }
        if self.placed {
            rest.put_first("id", &id);
            self.add("-chardev", &format!("null,{rest}"));
        } else {
            self.place_console(&id, &rest.to_string());
        }
    }

    /// Adds the console's socket; the answer is how to use it.
    fn place_console(&mut self, id: &str, more: &str) -> String {
        self.placed = true;
        let more = if more.is_empty() { String::new() } else { format!(",{more}") };
        let socket = self.socket(id, "console.sock");
        self.add("-chardev", &format!("{socket}{more}"));
        format!("chardev:{id}")
    }

    fn socket(&self, id: &str, file: &str) -> String {
        let path = escape_commas(&self.path_in_run_dir(file));
        format!("socket,id={},path={path},server=on,wait=off", escape_commas(id))
    }

    /// Adds what we need beside what the user wrote.
    fn add_ours(&mut self, command: &CommandLine) -> Result<(), CommandLineError> {
        if let Some(option) = self.accelerator.option.clone() {
            self.add("-accel", &option);
        }
        if self.accelerator.without_kvm {
            self.notes.push(self.settings.accel.in_place_of_kvm());
        }
        if !command.has("name") {
            self.add("-name", &format!("guest={}", escape_commas(self.settings.name)));
        }
        if let Some(file) = self.settings.shared_ram.filter(|_| wants_shared_ram(command)) {
            let size = command.memory_size()?;
            let path = format!("/proc/self/fd/{file}");
            self.add("-object", &format!("memory-backend-file,id={RAM},mem-path={path},size={size},share=on"));
            self.add("-machine", &format!("memory-backend={RAM}"));
        }
        if self.console == Console::Default {
            let backend = self.place_console(CONSOLE, "");
            self.add("-serial", &backend);
        }
        if !["display", "vnc", "spice", "nographic"].iter().any(|option| command.has(option)) {
            self.add("-display", "none");
        }
        let qmp = self.socket(QMP, "qmp.sock");
        self.add("-chardev", &qmp);
        self.add("-mon", &format!("chardev={QMP},mode=control"));
        self.add("-pidfile", &self.path_in_run_dir("qemu.pid"));
        if let Some(incoming) = &self.settings.incoming {
            self.add("-machine", &format!("type={}", escape_commas(&incoming.machine_type)));
            self.argv.push("-S".into());
            self.add("-incoming", "defer");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
