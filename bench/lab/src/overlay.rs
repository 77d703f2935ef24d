//! One file that a program sees in place of another: names without a name server.

use std::{ffi::CString, io, os::unix::process::CommandExt, path::Path, process::Command};

use crate::{Error, Result};

/// Makes `command`, once it runs, see `file` where others see `place`.
pub fn apply(command: &mut Command, file: &Path, place: &Path) -> Result<()> {
    let text = |path: &Path| {
        let bytes = path.as_os_str().as_encoded_bytes();
        CString::new(bytes).map_err(|_| Error::Unexpected(format!("{} is no path", path.display())))
    };
    let (file, place) = (text(file)?, text(place)?);
    let mount = move || {
        let private = libc::MS_REC | libc::MS_PRIVATE;
        // SAFETY: async-signal-safe calls with live C strings and no data.
        let done = unsafe {
            let none = std::ptr::null();
            libc::unshare(libc::CLONE_NEWNS) == 0
                && libc::mount(none, c"/".as_ptr(), none, private, none.cast()) == 0
                && libc::mount(file.as_ptr(), place.as_ptr(), none, libc::MS_BIND, none.cast()) == 0
        };
        if done { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: between fork and exec `mount` allocates nothing and takes no lock.
    unsafe { command.pre_exec(mount) };
    Ok(())
}
