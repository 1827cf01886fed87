//! The states that QEMU names, open to states that a newer QEMU adds.

/// An enum of QEMU's words that takes any word.
macro_rules! open_enum {
    ($(#[$about:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$about])*
        #[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        #[serde(from = "String", into = "String")]
        pub enum $name {
            $($(#[$doc])* $variant,)*
            /// A word that was not known when this was written.
            Other(String),
        }

        impl From<&str> for $name {
            fn from(word: &str) -> Self {
                match word {
                    $($word => Self::$variant,)*
                    other => Self::Other(other.into()),
                }
            }
        }

        impl From<String> for $name {
            fn from(word: String) -> Self {
                Self::from(word.as_str())
            }
        }

        impl From<$name> for String {
            fn from(state: $name) -> Self {
                state.to_string()
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(match self {
                    $(Self::$variant => $word,)*
                    Self::Other(word) => word,
                })
            }
        }
    };
}

pub(crate) use open_enum;

open_enum! {
    /// Where a migration stands, in QEMU's words.
    MigrationStatus {
        /// None was started.
        None = "none",
        /// Connecting and making ready.
        Setup = "setup",
        /// Pre-copy.
        Active = "active",
        /// Paused before the device state; waits for `migrate-continue`.
        PreSwitchover = "pre-switchover",
        /// The device state is under way.
        Device = "device",
        /// The destination may run the guest; RAM follows.
        PostcopyActive = "postcopy-active",
        /// Post-copy lost its connection.
        PostcopyPaused = "postcopy-paused",
        /// Post-copy is about to find its connection again (9.1 and newer).
        PostcopyRecoverSetup = "postcopy-recover-setup",
        /// Post-copy finds out what is missing, after a lost connection.
        PostcopyRecover = "postcopy-recover",
        /// Done.
        Completed = "completed",
        /// It failed; `error-desc` may say why.
        Failed = "failed",
        /// It is being cancelled.
        Cancelling = "cancelling",
        /// It was cancelled.
        Cancelled = "cancelled",
        /// Waits for the guest to let go of a device.
        WaitUnplug = "wait-unplug",
        /// Two QEMUs in lockstep.
        Colo = "colo",
    }
}

impl MigrationStatus {
    /// The source has let the guest go, or is about to; there is no way back.
    pub fn is_post_copy(&self) -> bool {
        let word = self.to_string();
        word.starts_with("postcopy-")
    }
}

open_enum! {
    /// What a QEMU does with its guest, in QEMU's words.
    RunState {
        /// The guest runs.
        Running = "running",
        /// Paused by `stop`.
        Paused = "paused",
        /// Waits for or receives a guest.
        InMigrate = "inmigrate",
        /// Paused after it was migrated away.
        PostMigrate = "postmigrate",
        /// Paused for the end of its migration.
        FinishMigrate = "finish-migrate",
        /// Not started since `-S` was given.
        Prelaunch = "prelaunch",
        /// Loading a snapshot.
        RestoreVm = "restore-vm",
        /// Saving a snapshot.
        SaveVm = "save-vm",
        /// Shut down, and `-no-shutdown` was given.
        Shutdown = "shutdown",
        /// Asleep; a wake-up makes it run.
        Suspended = "suspended",
        /// KVM or QEMU cannot go on with it.
        InternalError = "internal-error",
        /// A disk failed and the guest waits.
        IoError = "io-error",
        /// The guest says that it panicked.
        GuestPanicked = "guest-panicked",
        /// The guest's watchdog fired.
        Watchdog = "watchdog",
        /// A debugger holds it.
        Debug = "debug",
        /// Two QEMUs in lockstep.
        Colo = "colo",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_that_a_newer_qemu_invents_is_kept_as_it_is() {
        let status: MigrationStatus = serde_json::from_str(r#""teleporting""#).unwrap();
        assert_eq!(status, MigrationStatus::Other("teleporting".into()));
        assert_eq!(serde_json::to_string(&status).unwrap(), r#""teleporting""#);
    }

    #[test]
    fn known_words_come_back_as_they_were() {
        for word in ["postcopy-recover-setup", "pre-switchover", "none"] {
            assert_eq!(MigrationStatus::from(word).to_string(), word);
            assert!(!matches!(MigrationStatus::from(word), MigrationStatus::Other(_)));
        }
        assert_eq!(RunState::from("finish-migrate"), RunState::FinishMigrate);
    }
}
