//! The page map of another process, scanned for pages that were written (`PAGEMAP_SCAN`, Linux 6.7,
//! Documentation/admin-guide/mm/pagemap.rst).

use std::fs::File;
use std::io;
use std::ops::Range;

use super::ioctls::{self, PageRegion};
use crate::PAGE;

/// How many regions are asked for at once: 96 KiB, which stay in the processor's cache.
const REGIONS: usize = 4096;

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Pagemap(File);

impl Pagemap {
    pub(crate) fn open(pid: u32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/pagemap")).map(Self)
    }

    /// Adds the addresses of what was written, in order and with neighbours merged. With `protect` each page is
    /// protected again in the instant in which it is looked at, so that no write is lost between the two; this fails
    /// where nothing is registered for tracking.
    ///
    /// What was never protected counts as written.
    pub(crate) fn written(&self, range: Range<u64>, protect: bool, found: &mut Vec<Range<u64>>) -> io::Result<()> {
        let pages = (range.end - range.start) / PAGE;
        // Between any two regions is a page that was not written.
        let most = pages.div_ceil(2).min(REGIONS as u64) as usize;
        let mut regions = vec![PageRegion::default(); most];
        let mut start = range.start;
        let begun = found.len();
        while start < range.end {
            let (count, walked) = ioctls::scan(&self.0, start..range.end, protect, &mut regions)?;
            for region in &regions[..count] {
                match found[begun..].last_mut() {
                    Some(last) if last.end == region.start => last.end = region.end,
                    _ => found.push(region.start..region.end),
                }
            }
            if count < regions.len() {
                // There was room for more, so all was walked. The kernel may tell an earlier end: it collects 512
                // regions at a time, and when the walk ends within the last of these, it tells where that began.
                break;
            }
            let walked = regions.last().map_or(walked, |last| walked.max(last.end));
            if walked <= start {
                return Err(io::Error::other("the scan of a page map did not move on"));
            }
            start = walked;
        }
        Ok(())
    }
}
