//! What the loader hands to whoever passes it on.

use std::os::fd::BorrowedFd;

/// Maps that other processes get.
#[derive(Clone, Copy, Debug)]
pub struct SharedFds<'a> {
    pub abi: BorrowedFd<'a>,
    pub endpoints: BorrowedFd<'a>,
    pub observed: BorrowedFd<'a>,
    pub stats: BorrowedFd<'a>,
    pub drops: BorrowedFd<'a>,
}
