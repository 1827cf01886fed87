//! Migrations that are only reckoned: what a policy does to a guest, on a link, with an engine.
//!
//! The policies are the same code that decides about real guests. Everything else is a model: a [`Guest`] is some parts
//! of memory, each written at its own rate; a [`Link`] has a rate that changes; an [`Engine`] costs what real runs cost
//! (docs/FIGURES.md). Nothing depends on a clock or on chance other than the seed, so that each case can be replayed.
//! docs/POLICY.md says what of this was measured, and what is assumed.
//!
//! With a guest made from what was seen of a real one ([`Observed`]) the same play is a [`forecast`](fn@forecast).

mod cases;
mod engine;
mod forecast;
mod guest;
mod link;
mod migration;
mod observed;
mod oracle;
mod page;
mod random;
mod table;

pub use cases::{Case, cases, published};
pub use engine::{Engine, EngineKind};
pub use forecast::{Forecast, Given, Method, forecast};
pub use guest::{Guest, Part};
pub use link::Link;
pub use migration::{End, Outcome, run, run_tuned};
pub use observed::{Luck, Observed, Since, Written};
pub use oracle::best_in_hindsight;
pub use random::Random;
pub use table::{Contestant, Row, Table, contestants, play};
