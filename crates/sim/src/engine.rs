//! What an engine costs. Measured where docs/FIGURES.md has a figure, assumed where it has none; docs/POLICY.md has both
//! lists.

/// Who copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// The agents.
    External,
    /// QEMU.
    Qemu,
}

/// See the module's text. Seconds, and bytes a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Engine {
    /// Who copies.
    pub kind: EngineKind,
    /// It sends no faster, whatever the link carries.
    pub most_rate: f64,
    /// A look at a GiB.
    pub scan: f64,
    /// What each page costs the guest that it writes after a look.
    pub write_fault: f64,
    /// From the decision until the guest stands.
    pub pause: f64,
    /// A switchover besides its pages.
    pub switchover: f64,
    /// The guest stands while it turns to post-copy.
    pub post_copy: f64,
    /// It waits for a page in post-copy, besides the round trip.
    pub fault: f64,
    /// In post-copy it sends this share of what it does otherwise.
    pub in_post_copy: f64,
    /// How often the policy is asked.
    pub poll: f64,
    /// What a guest waits longer at worst where its writes begin to be paced.
    pub paced_stall: f64,
}

impl Engine {
    /// The agents.
    pub fn external() -> Self {
        Self {
            kind: EngineKind::External,
            most_rate: 1100.0 * 1_048_576.0,
            scan: 0.003,
            write_fault: 1e-6,
            pause: 0.005,
            switchover: 0.028,
            post_copy: 0.033,
            fault: 0.0008,
            in_post_copy: 1.0,
            poll: 0.1,
            paced_stall: 1.0,
        }
    }

    /// QEMU, encrypted as it is by default.
    pub fn qemu() -> Self {
        Self {
            kind: EngineKind::Qemu,
            most_rate: 400.0 * 1_048_576.0,
            scan: 0.001,
            write_fault: 0.5e-6,
            pause: 0.005,
            switchover: 0.05,
            post_copy: 0.2,
            fault: 0.004,
            in_post_copy: 0.8,
            poll: 0.25,
            paced_stall: 0.0,
        }
    }
}
