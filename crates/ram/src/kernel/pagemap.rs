//! The page map of another process, scanned for pages that were written (`PAGEMAP_SCAN`, Linux 6.7,
//! Documentation/admin-guide/mm/pagemap.rst).

use std::fs::File;
use std::io;
use std::ops::Range;

use super::ioctls::{self, PageRegion, Scan};
use crate::PAGE;

/// How many regions are asked for at once: 96 KiB, which stay in the processor's cache.
const REGIONS: usize = 4096;

/// Runs of pages that are no further apart than so many are protected by one call.
const NEAR: u64 = 8;

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Pagemap(File);

impl Pagemap {
    pub(crate) fn open(pid: u32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/pagemap")).map(Self)
    }

    /// Adds the addresses of what was written, in order and with neighbours merged. What was never protected counts as
    /// written.
    pub(crate) fn written(&self, range: Range<u64>, found: &mut Vec<Range<u64>>) -> io::Result<()> {
        self.scan(range, Scan::Find, found)
    }

    /// The same, and protects each of these pages again in the instant in which it is scanned, so that no write is lost
    /// between the two. Fails where nothing is registered for tracking.
    ///
    /// The kernel takes all of a range that it is to protect out of KVM's page tables, what was not written as well
    /// (`mmu_notifier_invalidate_range_start` in its `do_pagemap_scan`), and the guest would pay for each page that it
    /// merely reads. So it is scanned first, and protected only around what was found.
    pub(crate) fn take_written(&self, range: Range<u64>, found: &mut Vec<Range<u64>>) -> io::Result<()> {
        let mut seen = Vec::new();
        self.scan(range, Scan::Check, &mut seen)?;
        let mut seen = seen.into_iter().peekable();
        while let Some(mut near) = seen.next() {
            while let Some(next) = seen.next_if(|next| next.start - near.end <= NEAR * PAGE) {
                near.end = next.end;
            }
            self.scan(near, Scan::Protect, found)?;
        }
        Ok(())
    }

    fn scan(&self, range: Range<u64>, scan: Scan, found: &mut Vec<Range<u64>>) -> io::Result<()> {
        let pages = (range.end - range.start) / PAGE;
        // Between any two regions is a page that was not written.
        let most = pages.div_ceil(2).min(REGIONS as u64) as usize;
        let mut regions = vec![PageRegion::default(); most];
        let mut start = range.start;
        let begun = found.len();
        while start < range.end {
            let (count, walked) = ioctls::scan(&self.0, start..range.end, scan, &mut regions)?;
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
