//! On a child that is this test program once more, in [`a_program_that_notices_everything`].

use std::collections::HashMap;
use std::env;
use std::hint::black_box;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::process::{Signal, kill_process};
use rustix::thread::{NanosleepRelativeResult, Timespec, gettid, nanosleep};

use super::*;

/// Tells the child what it is.
const ROLE: &str = "VMFERRY_TEST_ROLE";
/// How often each thread is stopped.
const TIMES: u64 = 100;
const BUSY: usize = 6;
/// The number of the system call.
const READ: &str = if cfg!(target_arch = "x86_64") { "0" } else { "63" };

/// Busy threads, one that sleeps, and one that reads; all of them notice what should not have happened to them.
struct Program {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    process: Process,
    /// By what they do: `main`, `read`, `sleep` and `busy0` and so on.
    threads: HashMap<String, u32>,
}

impl Program {
    fn start() -> Self {
        let name = "kernel::inject::tests::a_program_that_notices_everything";
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", name, "--ignored", "--nocapture", "--quiet"])
            .env(ROLE, "program")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let process = Process::open(child.id()).unwrap();
        let input = child.stdin.take().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut threads = HashMap::from([("main".to_owned(), child.id())]);
        while threads.len() < BUSY + 3 {
            let mut line = String::new();
            assert!(output.read_line(&mut line).unwrap() > 0, "the program ended");
            if let Some((name, id)) = line.trim().strip_prefix("thread ").and_then(|rest| rest.split_once(' ')) {
                threads.insert(name.to_owned(), id.parse().unwrap());
            }
        }
        Self { child, input, output, process, threads }
    }

    /// The thread is in this system call.
    fn wait_until_in(&self, thread: &str, call: &str) {
        let path = format!("/proc/{}/task/{}/syscall", self.process.pid, self.threads[thread]);
        let begun = Instant::now();
        while fs::read_to_string(&path).unwrap().split(' ').next() != Some(call) {
            assert!(begun.elapsed() < Duration::from_secs(10), "{thread} never was in system call {call}");
            thread::yield_now();
        }
    }

    fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.process.pid)).unwrap().count()
    }

    /// Lets it end, and gives back what it noticed.
    fn end(mut self) -> String {
        self.input.write_all(b"e").unwrap();
        let mut noticed = String::new();
        for line in self.output.by_ref().lines().map_while(Result::ok) {
            if let Some(what) = line.strip_prefix("noticed ") {
                noticed.push_str(what);
            }
        }
        assert!(self.child.wait().unwrap().success(), "the program failed");
        noticed
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

static SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: libc::c_int) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

/// Computes in two ways at once, in registers; a register that was changed makes a difference.
fn compute(done: &AtomicBool, rounds: &AtomicU64) -> bool {
    let (mut one, mut other, mut float) = (1_u64, 1_u64, 1.0_f64);
    while !done.load(Ordering::Relaxed) {
        for _ in 0..1000 {
            one = black_box(one).wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            other = other.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(black_box(1));
            float = black_box(float) * 1.5 / 1.5;
        }
        if one != other || float.to_bits() != 1.0_f64.to_bits() {
            return false;
        }
        rounds.fetch_add(1, Ordering::Relaxed);
    }
    true
}

#[test]
#[ignore = "other tests start it"]
fn a_program_that_notices_everything() {
    if env::var_os(ROLE).is_none() {
        return;
    }
    // SAFETY: the handler only counts.
    #[expect(unsafe_code)]
    unsafe {
        libc::signal(libc::SIGRTMIN(), count as *const () as libc::sighandler_t);
    }
    let (done, rounds) = (&AtomicBool::new(false), &AtomicU64::new(0));
    let say = |name: &str| println!("thread {name} {}", gettid().as_raw_nonzero());
    let noticed: Vec<String> = thread::scope(|scope| {
        let mut threads = Vec::new();
        for busy in 0..BUSY {
            threads.push(scope.spawn(move || {
                say(&format!("busy{busy}"));
                (!compute(done, rounds)).then(|| "a register changed; ".to_owned())
            }));
        }
        threads.push(scope.spawn(move || {
            say("sleep");
            while !done.load(Ordering::Relaxed) {
                let begun = Instant::now();
                let slept = nanosleep(&Timespec { tv_sec: 0, tv_nsec: 20_000_000 });
                if !matches!(slept, NanosleepRelativeResult::Ok) || begun.elapsed() < Duration::from_millis(20) {
                    return Some(format!("a sleep ended after {:?}; ", begun.elapsed()));
                }
            }
            None
        }));
        threads.push(scope.spawn(move || {
            say("read");
            let mut byte = [0];
            let read = loop {
                match rustix::io::read(rustix::stdio::stdin(), &mut byte) {
                    Ok(1) if byte == *b"e" => break None,
                    Ok(1) => println!("echo"),
                    other => break Some(format!("a read gave {other:?}; ")),
                }
            };
            done.store(true, Ordering::Relaxed);
            read
        }));
        threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
    });
    assert!(rounds.load(Ordering::Relaxed) > 0);
    let signals = match SIGNALS.load(Ordering::Relaxed) {
        0 => String::new(),
        count => format!("signals {count}"),
    };
    println!("\nnoticed {}{signals}", noticed.concat());
}

/// As [`make_in`] does it, in a chosen thread.
fn make_and_close(program: &Program, thread: &str) -> Duration {
    let flags = u64::from((OFlags::CLOEXEC | OFlags::NONBLOCK).bits()) | USER_MODE_ONLY;
    let work = |stopped: &mut Stopped| {
        let number = stopped.call("userfaultfd", machine::USERFAULTFD, [flags, 0, 0])?;
        assert!(program.process.has_userfaultfd(number as RawFd));
        stopped.call("close", machine::CLOSE, [number as u64, 0, 0])
    };
    with_one_of(&program.process, &[program.threads[thread]], work).unwrap().1
}

#[test]
fn a_program_does_not_notice_that_its_threads_made_system_calls() {
    let program = Program::start();
    let descriptors = program.descriptors();
    program.wait_until_in("read", READ);
    for thread in ["main", "read", "sleep", "busy0", "busy1"] {
        let mut times: Vec<Duration> = (0..TIMES).map(|_| make_and_close(&program, thread)).collect();
        times.sort_unstable();
        let median = times[times.len() / 2];
        println!("{thread} stood still: median {median:?}, worst {:?}", times[times.len() - 1]);
        // A busy thread also waits for its turn among the others, as it would without us.
        assert!(thread.starts_with("busy") || median < Duration::from_millis(5), "{thread}: {median:?}");
    }
    assert_eq!(program.descriptors(), descriptors);
    program.wait_until_in("read", READ);
    assert_eq!(program.end(), "");
}

#[test]
fn a_userfaultfd_stays_in_the_process_only_if_it_is_to() {
    let program = Program::start();
    let descriptors = program.descriptors();
    let ours = make_in(&program.process, Reach::User, Keep::Ours).unwrap();
    assert_eq!(program.descriptors(), descriptors);
    let there = make_in(&program.process, Reach::User, Keep::There).unwrap();
    assert_eq!((program.descriptors(), there.number), (descriptors + 1, ours.number));
    assert!(program.process.take(there.number).is_ok());
    close_in(&program.process, there.number).unwrap();
    assert_eq!(program.descriptors(), descriptors);
    assert!(matches!(close_in(&program.process, there.number), Err(InjectError::NotOurs { .. })));
    assert!(matches!(close_in(&program.process, 0), Err(InjectError::NotOurs { number: 0 })));
    assert_eq!(program.end(), "");
}

/// Ends another thread's loop, also when a test fails.
struct Finish<'a>(&'a AtomicBool);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// To one thread, which counts it.
fn signal(pid: u32, thread: u32) {
    // SAFETY: a signal to a child that handles it.
    #[expect(unsafe_code)]
    let result = unsafe { libc::syscall(libc::SYS_tgkill, pid, thread, libc::SIGRTMIN()) };
    assert_eq!(result, 0);
}

#[test]
fn a_signal_that_comes_before_the_call_finds_the_threads_own_registers() {
    let program = Program::start();
    program.wait_until_in("read", READ);
    let threads = ["main", "read", "busy0"];
    for _ in 0..TIMES {
        for thread in threads {
            let thread = program.threads[thread];
            let work = |stopped: &mut Stopped| {
                signal(program.process.pid, thread);
                stopped.call("close", machine::CLOSE, [u64::MAX, 0, 0])
            };
            let error = with_one_of(&program.process, &[thread], work).unwrap_err();
            assert!(matches!(error, InjectError::Refused { call: "close", .. }), "{error:?}");
        }
    }
    program.wait_until_in("read", READ);
    assert_eq!(program.end(), format!("signals {}", TIMES * threads.len() as u64));
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_thread_that_has_our_registers_is_waited_for_as_long_as_it_takes() {
    let program = Program::start();
    program.wait_until_in("read", READ);
    let thread = program.threads["read"];
    let begun = Instant::now();
    let error = thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(PATIENCE * 3);
            signal(program.process.pid, thread);
        });
        // It ends with the signal.
        let work = |stopped: &mut Stopped| stopped.call("pause", libc::SYS_pause as u64, [0; 3]);
        with_one_of(&program.process, &[thread], work).unwrap_err()
    });
    assert!(matches!(error, InjectError::Refused { call: "pause", .. }), "{error:?}");
    assert!(begun.elapsed() > PATIENCE * 2);
    program.wait_until_in("read", READ);
    assert_eq!(program.end(), "signals 1");
}

#[test]
fn every_signal_that_arrives_meanwhile_is_delivered() {
    let program = Program::start();
    let pid = program.process.pid;
    let done = AtomicBool::new(false);
    let sent = thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut sent = 0;
            while !done.load(Ordering::Relaxed) {
                // To the main thread only: a sleep ends when its thread handles a signal.
                signal(pid, pid);
                sent += 1;
                thread::sleep(GLANCE);
            }
            sent
        });
        let finish = Finish(&done);
        for _ in 0..TIMES * 10 {
            make_and_close(&program, "main");
        }
        drop(finish);
        sender.join().unwrap()
    });
    assert_eq!(program.end(), format!("signals {sent}"));
}

#[test]
fn a_process_that_is_paused_and_continued_all_the_time_goes_on() {
    let program = Program::start();
    let pid = rustix::process::Pid::from_raw(program.process.pid as i32).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                kill_process(pid, Signal::STOP).unwrap();
                kill_process(pid, Signal::CONT).unwrap();
                thread::sleep(Duration::from_micros(500));
            }
        });
        let _finish = Finish(&done);
        for _ in 0..TIMES {
            make_and_close(&program, "main");
            make_and_close(&program, "busy1");
        }
    });
    assert_eq!(program.end(), "");
}

#[test]
fn a_paused_process_stays_paused() {
    let program = Program::start();
    let pid = rustix::process::Pid::from_raw(program.process.pid as i32).unwrap();
    let state = || fs::read_to_string(format!("/proc/{}/stat", program.process.pid)).unwrap();
    let wait_for = |wanted: &str| {
        let begun = Instant::now();
        while !state().contains(wanted) {
            assert!(begun.elapsed() < Duration::from_secs(10), "not {wanted}");
            thread::yield_now();
        }
    };
    kill_process(pid, Signal::STOP).unwrap();
    wait_for(") T ");
    make_in(&program.process, Reach::User, Keep::Ours).unwrap();
    wait_for(") T ");
    kill_process(pid, Signal::CONT).unwrap();
    wait_for(") S ");
    drop(program.end());
}

#[test]
fn a_process_that_is_killed_in_the_middle_is_gone() {
    for after in [Duration::ZERO, Duration::from_micros(300), Duration::from_micros(900)] {
        let mut program = Program::start();
        let result = thread::scope(|scope| {
            let calls = scope.spawn(|| {
                loop {
                    if let Err(error) = make_in(&program.process, Reach::User, Keep::Ours) {
                        return error;
                    }
                }
            });
            thread::sleep(after);
            kill_process(rustix::process::Pid::from_raw(program.process.pid as i32).unwrap(), Signal::KILL).unwrap();
            calls.join().unwrap()
        });
        assert!(matches!(result, InjectError::Gone), "{result:?}");
        assert!(!program.child.wait().unwrap().success());
    }
}

#[test]
fn a_process_that_is_traced_is_refused_with_its_tracers_pid() {
    let program = Program::start();
    let (ready, is_ready) = std::sync::mpsc::channel();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    thread::scope(|scope| {
        let thread = Pid::from_raw(program.process.pid as i32);
        scope.spawn(move || {
            ptrace::seize(thread, ptrace::Options::empty()).unwrap();
            ready.send(()).unwrap();
            let _ = ended.recv();
        });
        is_ready.recv().unwrap();
        let us = std::process::id();
        let error = make_in(&program.process, Reach::User, Keep::Ours).unwrap_err();
        assert!(matches!(error, InjectError::AlreadyTraced { tracer } if tracer == us), "{error:?}");
        drop(end);
    });
    // A thread lets go of what it traces only after everybody may think that it has ended.
    let begun = Instant::now();
    while program.process.thread_status(program.process.pid).unwrap().tracer.is_some() {
        assert!(begun.elapsed() < Duration::from_secs(10), "still traced");
        thread::yield_now();
    }
    make_in(&program.process, Reach::User, Keep::Ours).unwrap();
    assert_eq!(program.end(), "");
}

#[test]
fn a_process_that_has_ended_is_gone() {
    let mut child = Command::new("true").spawn().unwrap();
    let process = Process::open(child.id()).unwrap();
    child.wait().unwrap();
    assert!(process.is_gone());
    assert!(make_in(&process, Reach::User, Keep::Ours).is_err());
}

/// This test program once more, as an agent that never stops making userfaultfds in that process.
fn agent(pid: u32) -> Child {
    Command::new(env::current_exe().unwrap())
        .args(["--exact", "kernel::inject::tests::an_agent_that_reaches_in_all_the_time", "--ignored", "--nocapture"])
        .env(ROLE, pid.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // A tracer that nobody hears any more complains.
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
#[ignore = "another test starts it"]
fn an_agent_that_reaches_in_all_the_time() {
    let Some(pid) = env::var(ROLE).ok().and_then(|pid| pid.parse().ok()) else { return };
    tracer::trace_by(|| {
        let mut tracer = Command::new("/proc/self/exe");
        tracer.args(["--exact", "kernel::inject::tests::a_tracer", "--ignored", "--nocapture", "--quiet"]);
        tracer
    });
    let process = Process::open(pid).unwrap();
    loop {
        match make_in(&process, Reach::User, Keep::Ours) {
            Ok(_) => println!("made"),
            // By what the agent before this one has started, for another moment.
            Err(InjectError::AlreadyTraced { .. }) => {}
            Err(error) => panic!("{error:?}"),
        }
    }
}

#[test]
#[ignore = "another test starts it"]
fn a_tracer() {
    if env::var_os(ROLE).is_some() {
        tracer::trace_qemu();
    }
}

#[test]
fn a_program_does_not_notice_that_the_agent_is_killed_while_a_thread_makes_its_call() {
    let program = Program::start();
    let descriptors = program.descriptors();
    for round in 0..TIMES / 2 {
        let mut agent = agent(program.process.pid);
        // From its first on, at any time within another one.
        let mut lines = BufReader::new(agent.stdout.take().unwrap()).lines().map_while(Result::ok);
        assert!(lines.any(|line| line.ends_with("made")), "it cannot reach in");
        thread::sleep(Duration::from_micros(round * 197));
        agent.kill().unwrap();
        agent.wait().unwrap();
    }
    let begun = Instant::now();
    let is_traced = || program.process.thread_status(program.process.pid).unwrap().tracer.is_some();
    while program.descriptors() != descriptors || is_traced() {
        assert!(begun.elapsed() < Duration::from_secs(10), "something is left of it");
        thread::yield_now();
    }
    assert_eq!(program.end(), "");
}
