//! What only measurements need: whoever witnesses a measuring guest, what that boots from, and what is done in its
//! migration.

pub(crate) mod boot_files;
pub(crate) mod scripts;
pub(crate) mod witness;
