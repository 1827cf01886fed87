//! A move that is looked at again and again while it goes: how it is shown, and how Ctrl-C cancels it.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use vmferry_api::client::Client;

use crate::failure::Failure;
use crate::vms::memory;

/// Between two looks at how far it is.
const LOOK: Duration = Duration::from_millis(200);
/// Between two lines of progress where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(1);

/// Shown as JSON, as a bar, or in lines.
enum Shown {
    Json,
    Bar(ProgressBar),
    Lines(Option<Instant>),
}

/// See the module's text.
pub(crate) struct Watched {
    shown: Shown,
    cancelling: bool,
}

impl Watched {
    pub(crate) fn new(json: bool) -> Self {
        let shown = if json {
            Shown::Json
        } else if std::io::stderr().is_terminal() {
            let template = "[{bar:24}] {binary_bytes}/{binary_total_bytes} {msg}";
            let style = ProgressStyle::with_template(template).expect("the template is valid");
            Shown::Bar(ProgressBar::new(0).with_style(style.progress_chars("=> ")))
        } else {
            Shown::Lines(None)
        };
        Self { shown, cancelling: false }
    }

    /// How it is now: so many bytes of so many, and in words.
    pub(crate) fn show(&mut self, view: &impl Serialize, (done, total): (u64, u64), words: String) {
        match &mut self.shown {
            Shown::Json => print_line(view),
            Shown::Bar(bar) => {
                bar.set_length(total);
                bar.set_position(done);
                bar.set_message(words);
            }
            Shown::Lines(last) => {
                if last.is_none_or(|last| last.elapsed() >= LINE_EVERY) {
                    *last = Some(Instant::now());
                    eprintln!("{} of {} {words}", memory(done), memory(total));
                }
            }
        }
    }

    /// Waits until it is to be looked at again. The first Ctrl-C has what is at this path cancelled, the second one ends the
    /// looking.
    pub(crate) async fn wait(&mut self, client: &Client, path: &str) -> Result<(), Failure> {
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            _ = tokio::signal::ctrl_c() => {
                if std::mem::replace(&mut self.cancelling, true) {
                    return Err(Failure::StoppedLooking);
                }
                eprintln!("\ncancelling; once more to stop looking");
                if let Err(failure) = client.delete(path).await {
                    Failure::from(failure).tell();
                }
            }
        }
        Ok(())
    }

    /// It is over, and became this. Tells whether there is more to say than that.
    pub(crate) fn end(&self, view: &impl Serialize) -> bool {
        match &self.shown {
            Shown::Json => print_line(view),
            Shown::Bar(bar) => bar.finish_and_clear(),
            Shown::Lines(_) => {}
        }
        !matches!(self.shown, Shown::Json)
    }
}

fn print_line(view: &impl Serialize) {
    println!("{}", serde_json::to_string(view).expect("it is plain data"));
}
