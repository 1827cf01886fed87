//! What is asked of the kernel, and the only place here with `unsafe`: a [`Userfaultfd`], which is taken from another
//! process ([`make_in`]), and the [`Pagemap`] of that process.

mod inject;
mod ioctls;
mod machine;
mod pagemap;
mod support;
mod userfaultfd;
mod words;

pub use inject::InjectError;
pub use inject::tracer::{trace_by, trace_qemu};
pub(crate) use inject::{Inside, Keep, Reach, close_in, make_in};
pub(crate) use pagemap::Pagemap;
pub use support::{Unsupported, support};
pub(crate) use userfaultfd::{Copied, EnableError, Fault, Feature, Mode, Userfaultfd, Waited};
pub(crate) use words::Words;
