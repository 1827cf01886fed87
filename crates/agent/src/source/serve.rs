//! Post-copy goes on, over new connections when one is lost, while everything else that is due is done beside it.

use vmferry_api::in_one_line;
use vmferry_custody::source::{Deed, Event};

use super::custody::{Custody, Hands};
use super::post_copy::Serving;
use crate::error::AgentError;

impl Custody {
    /// With an engine, if there is none.
    async fn serve_again(&self, hands: &mut Hands<'_>) -> Result<Serving, AgentError> {
        let silent = || AgentError::Busy { what: format!("the QEMU of {}, which does not answer", self.record.vm) };
        let vm = self.vm().ok_or_else(silent)?;
        Serving::again(&self.host, &vm, (&self.peer, &self.record), &mut hands.engine).await
    }

    /// Post-copy goes on; beside it, everything else that is due.
    pub(super) async fn serve(&self, hands: &mut Hands<'_>) {
        let serving = match hands.serving.take() {
            Some(serving) => serving,
            None => match self.serve_again(hands).await {
                Ok(serving) => serving,
                Err(error) => {
                    tracing::debug!(vm = self.record.vm, error = in_one_line(&error), "post-copy cannot go on yet");
                    if self.vm().is_none() && !self.record.instance.is_alive() {
                        self.because("its QEMU here is gone");
                        self.tell(Event::Lost);
                    }
                    return;
                }
            },
        };
        let Some(engine) = hands.engine.as_mut() else { return };
        let mut events = self.vm().map(|vm| vm.qmp.events());
        let audience = hands.audience;
        let outcome = {
            let following = serving.follow((&self.peer, self.record.id), engine.as_mut(), audience);
            tokio::pin!(following);
            loop {
                tokio::select! {
                    outcome = &mut following => break Some(outcome),
                    () = self.pause(&mut events) => {}
                }
                self.look().await;
                for deed in self.machine().due() {
                    match deed {
                        Deed::Pause => self.stand().await,
                        Deed::Write(row) => self.write(row, audience).await,
                        _ => {}
                    }
                }
                if !self.machine().due().contains(&Deed::Serve) {
                    break None;
                }
            }
        };
        match outcome {
            Some(Ok(())) => self.tell(Event::Complete),
            Some(Err(reason)) => {
                self.lock().why = format!("post-copy could not be finished: {reason}");
                self.tell(Event::Lost);
            }
            // Its user has decided otherwise.
            None => hands.serving = None,
        }
    }
}
