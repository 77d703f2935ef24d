//! Where control finds us: the socket's file, its mode and its group.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use millrace_ebpf::link::{self, LinkListener, LinkPeer};

/// A listening socket; its file is removed when it is dropped.
pub struct LinkFile {
    listener: LinkListener,
    path: PathBuf,
}

impl LinkFile {
    /// Listens for control of `interface`. Only root may connect, and the group
    /// [`link::GROUP`] where there is one. What a killed process left is replaced.
    pub fn listen(interface: &str) -> io::Result<Self> {
        Self::listen_at(link::path(interface), group_id(link::GROUP))
    }

    /// The file is made in a directory that only we may enter and moved when its mode is right, so
    /// that at no moment somebody else can connect.
    fn listen_at(path: PathBuf, group: Option<u32>) -> io::Result<Self> {
        let parent = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(parent)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let directory = parent.join(format!(".{name}.new"));
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::DirBuilder::new().mode(0o700).create(&directory)?;
        let new = directory.join("socket");
        let bound = LinkListener::bind(&new).and_then(|listener| {
            if group.is_some() {
                chown(&new, None, group).map_err(|error| {
                    let what = format!("giving it to group {} (CAP_CHOWN): {error}", link::GROUP);
                    io::Error::new(error.kind(), what)
                })?;
            }
            let mode = if group.is_some() { 0o660 } else { 0o600 };
            fs::set_permissions(&new, fs::Permissions::from_mode(mode))?;
            fs::rename(&new, &path)?;
            Ok(listener)
        });
        // Empty, or of no use: the next start would remove it, too.
        let _ = fs::remove_dir_all(&directory);
        Ok(Self { listener: bound?, path })
    }

    pub fn accept(&self) -> io::Result<Option<LinkPeer>> {
        self.listener.accept()
    }
}

impl AsFd for LinkFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for LinkFile {
    fn drop(&mut self) {
        // If somebody removed it already, there is nothing to do.
        let _ = fs::remove_file(&self.path);
    }
}

/// Looked up in the file itself: who reads it through a network service would wait for the network
/// that we are to bring.
fn group_id(name: &str) -> Option<u32> {
    parse_group(&fs::read_to_string("/etc/group").ok()?, name)
}

/// Lines are `name:password:id:members` (group(5)).
fn parse_group(groups: &str, name: &str) -> Option<u32> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == name).then(|| fields.nth(1)?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use millrace_ebpf::link::LinkClient;

    use super::*;

    #[test]
    fn a_group_is_found_by_its_whole_name() {
        let groups = "root:x:0:\nmillrace-x:x:7:\nmillrace:x:998:alice,bob\n";
        assert_eq!(parse_group(groups, "millrace"), Some(998));
        assert_eq!(parse_group(groups, "mill"), None);
        assert_eq!(parse_group("millrace:x", "millrace"), None);
    }

    #[test]
    fn a_file_has_its_mode_and_replaces_a_dead_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/wg0.link");
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, b"left behind").unwrap();
        let file = LinkFile::listen_at(path.clone(), None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        LinkClient::connect(&path).unwrap();
        assert!(file.accept().unwrap().is_some());
        drop(file);
        assert!(!path.exists());
        let own_group = fs::metadata(directory.path()).unwrap().gid();
        let _file = LinkFile::listen_at(path.clone(), Some(own_group)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o660);
    }
}
