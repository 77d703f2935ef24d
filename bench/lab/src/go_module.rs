//! What a Go program says about the modules that it was built from, without a Go compiler.

use crate::{Error, Result};
use std::{fs, path::Path};

/// The version of `module` in `program`, whether it is the program's own module or one it uses.
pub fn version(program: &Path, module: &str) -> Result<String> {
    let bytes = fs::read(program);
    let bytes = bytes.map_err(Error::system(format!("read {}", program.display())))?;
    let found = ["mod", "dep"].iter().find_map(|kind| {
        let before = format!("{kind}\t{module}\t");
        let at = memmem(&bytes, before.as_bytes())? + before.len();
        let end = bytes[at..].iter().position(|&byte| byte == b'\t')?;
        str::from_utf8(&bytes[at..at + end]).ok()
    });
    let missing = || Error::Unexpected(format!("{} names no {module}", program.display()));
    found.map(str::to_owned).ok_or_else(missing)
}

fn memmem(bytes: &[u8], part: &[u8]) -> Option<usize> {
    bytes.windows(part.len()).position(|window| window == part)
}
