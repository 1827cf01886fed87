//! Copying an image from here.

use std::io::{Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::oneshot;
use uuid::Uuid;
use vmferry_api::{CopyEvent, CopyProgress, CopyReport, CopyRequest, Problem, Security, in_one_line};
use vmferry_link::fastest_cipher;
use vmferry_nbd::backend::{Access, Backend, File};
use vmferry_nbd::transfer::{How, LARGEST, Progress, SendError, Sum, send};

use super::copies::{Copies, Leaving};
use crate::engine::NewSession;
use crate::engine::external::WayThere;
use crate::error::AgentError;
use crate::peers::{CopyOffer, trust};

/// How often it is told how far it is.
const TICK: Duration = Duration::from_millis(200);
/// Rates are those of so much time, about.
const RATE_OVER: f64 = 3.0;
/// Threads that read and send; there is one more for each stream of the link.
const MOST_THREADS: usize = 4;

/// Begins a copy; what can be refused is refused before this returns.
pub(crate) async fn begin(copies: &Arc<Copies>, request: CopyRequest) -> Result<Uuid, AgentError> {
    let host = &copies.host;
    let image = Arc::new(Image::open(&request.image).await?);
    let found = trust::find_peer(host, &request.to).await?;
    let met = found.hello().await?;
    let peer = found.pinned_to(&met);
    let leaving = Leaving::new();
    let (id, under_way, session) = (leaving.id, copies.add(&leaving), NewSession::random());
    let offer = CopyOffer {
        id,
        under_way,
        path: request.path.clone(),
        size: image.disk.size(),
        update: request.update,
        plain: host.config.security_of(met.ip()) == Security::Plain,
        session: session.clone(),
    };
    let accepted = match peer.take_copy(&offer).await {
        Ok(accepted) if accepted.plain && !offer.plain => {
            Err(AgentError::PlainRefused { host: host.config.name.clone() })
        }
        answer => answer.map_err(AgentError::from),
    };
    let accepted = accepted.inspect_err(|error| leaving.tell(CopyEvent::Failed(error.into())))?;
    let cipher = fastest_cipher(&host.ciphers_for(met.ip()), &accepted.ciphers);
    let way = WayThere {
        address: peer.address().into(),
        identity: Arc::clone(&host.trusts.identity),
        peer: met.key,
        protection: (!accepted.plain).then_some(cipher),
    };
    let protection = match way.protection {
        None => "plain".into(),
        Some(cipher) => cipher.map_or_else(|| "tls".into(), |cipher| cipher.to_string()),
    };
    let rate = request.bandwidth.or(host.config.network_of(met.ip()).and_then(|it| it.rate).map(|rate| rate.0));
    let report = CopyReport {
        id,
        image: request.image,
        to: met.hello.name,
        path: request.path,
        size: image.disk.size(),
        sent: 0,
        same: 0,
        wire_sent: 0,
        total_ms: 0,
        protection,
        verified: request.verify,
    };
    let progress = Arc::new(Progress::default());
    let known = accepted.known;
    let (sender, ended) = oneshot::channel();
    let going = (Arc::clone(&leaving), Arc::clone(&progress));
    let go = move || {
        let (leaving, progress) = going;
        let sent = carry(&leaving, &image, &progress, &way, session, rate, (request.verify, known));
        // Whoever follows it lives as long as the agent.
        let _ = sender.send(sent);
    };
    let started = std::thread::Builder::new().name("copy".into()).spawn(go).map_err(AgentError::io("a thread"));
    started.inspect_err(|error| leaving.tell(CopyEvent::Failed(error.into())))?;
    tokio::spawn(follow(leaving, progress, report, ended));
    Ok(id)
}

fn refused(message: String) -> AgentError {
    AgentError::Conflict { message, hint: None }
}

/// What is copied, and how it was when it was opened.
struct Image {
    disk: File,
    file: std::fs::File,
    written: Option<SystemTime>,
}

impl Image {
    async fn open(path: &Path) -> Result<Self, AgentError> {
        let path = path.to_owned();
        let open = move || {
            let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
            let mut options = std::fs::OpenOptions::new();
            std::os::unix::fs::OpenOptionsExt::custom_flags(options.read(true), flags);
            let file =
                options.open(&path).map_err(|error| refused(format!("cannot open {}: {error}", path.display())))?;
            let kept = file.try_clone().map_err(AgentError::io(&path))?;
            let disk = File::over(file, &path, Access::Read).map_err(|error| refused(in_one_line(&error)))?;
            if disk.size() > LARGEST {
                return Err(refused(format!(
                    "{} is larger than the {} TiB that are copied",
                    path.display(),
                    LARGEST >> 40
                )));
            }
            let written = written(&kept);
            Ok(Self { disk, file: kept, written })
        };
        tokio::task::spawn_blocking(open).await.expect("opening does not panic")
    }

    /// Nobody has written to it, as far as can be seen.
    fn is_as_it_was(&self, path: &Path) -> Result<(), String> {
        let path = path.display();
        let size = (&self.file).seek(SeekFrom::End(0)).map_err(|error| format!("cannot look at {path}: {error}"))?;
        if size != self.disk.size() {
            return Err(format!(
                "{path} has changed while it was copied: it had {} bytes, and has {size}",
                self.disk.size()
            ));
        }
        if written(&self.file) != self.written {
            return Err(format!("{path} has changed while it was copied: somebody writes it"));
        }
        Ok(())
    }
}

/// When a file was written last; devices do not tell.
fn written(file: &std::fs::File) -> Option<SystemTime> {
    let known = file.metadata().ok()?;
    known.is_file().then(|| known.modified().ok())?
}

/// All of it over the link. Blocks.
fn carry(
    leaving: &Leaving,
    image: &Image,
    progress: &Progress,
    way: &WayThere,
    session: NewSession,
    rate: Option<u64>,
    (verify, known): (bool, bool),
) -> Result<Option<Sum>, String> {
    let link = Arc::new(way.connect(session, rate).map_err(|error| in_one_line(&error))?);
    leaving.goes_over(&link);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
    let path = std::path::PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&image.file)));
    let path = std::fs::read_link(&path).unwrap_or(path);
    let is_as_it_was = || image.is_as_it_was(&path);
    send(&link, &image.disk, How { threads, verify, known }, progress, &is_as_it_was).map_err(|error| match error {
        // A file that ends too early has become shorter.
        SendError::Read { .. } => is_as_it_was().err().unwrap_or_else(|| in_one_line(&error)),
        SendError::Link(_) => format!("the other host is not reached any more: {}", in_one_line(&error)),
        _ => in_one_line(&error),
    })
}

/// Tells how far it is, and how it ended.
async fn follow(
    leaving: Arc<Leaving>,
    progress: Arc<Progress>,
    report: CopyReport,
    mut ended: oneshot::Receiver<Result<Option<Sum>, String>>,
) {
    let begun = Instant::now();
    let (mut last, mut at) = (CopyProgress { total: report.size, ..CopyProgress::default() }, 0.0);
    let ended = loop {
        let waited = tokio::time::timeout(TICK, &mut ended).await;
        let now = begun.elapsed().as_secs_f64();
        let stats = leaving.link().map(|link| link.stats()).unwrap_or_default();
        let (done, wire_sent) = (progress.done.load(Relaxed), stats.wire_sent);
        let weight = ((now - at) / RATE_OVER).min(1.0);
        let rate = |before: u64, then: u64, now_at: u64| {
            let lately = now_at.saturating_sub(then) as f64 / (now - at).max(1e-3);
            (before as f64 + weight * (lately - before as f64)) as u64
        };
        last = CopyProgress {
            elapsed_ms: (now * 1e3) as u64,
            done,
            sent: progress.sent.load(Relaxed),
            same: progress.same.load(Relaxed),
            wire_sent,
            link_rate: rate(last.link_rate, last.wire_sent, wire_sent),
            rate: rate(last.rate, last.done, done),
            ..last
        };
        at = now;
        match waited {
            Err(_) => leaving.tell(CopyEvent::Progress(last)),
            Ok(ended) => break ended.unwrap_or_else(|_| Err("its thread has ended".into())),
        }
    };
    let what = format!("{} to {} on {}", report.image.display(), report.path.display(), report.to);
    leaving.tell(match ended {
        Ok(_) => {
            tracing::info!(size = report.size, wire = last.wire_sent, "copied {what}");
            let CopyProgress { sent, same, wire_sent, elapsed_ms, .. } = last;
            CopyEvent::Finished(Box::new(CopyReport { sent, same, wire_sent, total_ms: elapsed_ms, ..report }))
        }
        Err(why) => {
            let cancelled = leaving.is_cancelled();
            let why = if cancelled { "cancelled".into() } else { why };
            tracing::warn!(why, "did not copy {what}");
            let message = format!("did not copy {what}: {why}");
            CopyEvent::Failed(Problem::from(&AgentError::CopyFailed { message, cancelled }))
        }
    });
}
