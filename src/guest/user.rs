//! Finds the user and the groups of a program in the container's own files.
//!
//! These are `/etc/passwd` and `/etc/group`. Runs in the new process, after the fork. A file that blocks holds up this process alone.

use core::ffi::CStr;

use super::alloc::vec::Vec;
use super::spawn::SpawnError;
use super::sys::{self, Errno};
use crate::proto::{SpawnStep, Strings};

/// The longest file that is read. A longer one is refused, as what is behind it may matter.
const MAX_FILE: usize = 4 << 20;
/// Linux's limit of supplementary groups (`NGROUPS_MAX`, include/uapi/linux/limits.h).
const MAX_GROUPS: usize = 65_536;

/// What a process of a user has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Supplementary ones.
    pub(super) groups: Vec<u32>,
    /// `HOME=` and the home directory.
    pub(super) home: Vec<u8>,
}

/// Returns the identity of `USER`, `USER:GROUP`, each a name or a number. Root's, with no groups but those `added`, where there is none.
///
/// A number need not be in the files. Supplementary groups are those that list the user, unless a group is given, and those `added`.
///
/// # Errors
/// `ENOENT` for a name that is not in its file, with the step that says which.
pub(super) fn resolve(spec: Option<&[u8]>, added: Strings<'_>) -> Result<Identity, SpawnError> {
    let Some(spec) = spec else {
        let content = read(c"/etc/group").map_err(|errno| SpawnError::new(SpawnStep::Group, errno))?;
        let groups = added.iter().map(|wanted| find_group(&content, wanted.to_bytes())).collect::<Result<_, _>>()?;
        return Ok(Identity { uid: 0, gid: 0, groups, home: Vec::from(b"HOME=/root") });
    };
    identify(spec, added, || read(c"/etc/passwd"), || read(c"/etc/group"))
}

fn identify(
    spec: &[u8],
    added: Strings<'_>,
    passwd: impl FnOnce() -> Result<Vec<u8>, Errno>,
    group: impl FnOnce() -> Result<Vec<u8>, Errno>,
) -> Result<Identity, SpawnError> {
    let mut parts = spec.splitn(2, |&byte| byte == b':');
    let (user, own_group) = (parts.next().unwrap_or_default(), parts.next().filter(|group| !group.is_empty()));
    let at = |step| move |errno| SpawnError::new(step, errno);
    let passwd = passwd().map_err(at(SpawnStep::User))?;
    let number = number(user);
    let named = (!is_numeric(user)).then_some(user);
    let entry = lines(&passwd).map(User::parse).find(|entry| entry.is(named, number));
    let (uid, mut gid, name, home) = match (entry, number) {
        (Some(User { name, uid: Some(uid), gid: Some(gid), home }), _) => (uid, gid, name, home),
        (_, Some(uid)) => (uid, 0, &b""[..], &b"/"[..]),
        (_, None) => return Err(SpawnError::new(SpawnStep::User, Errno::ENOENT)),
    };
    let mut groups = Vec::new();
    if own_group.is_some() || !name.is_empty() || !added.is_empty() {
        let content = group().map_err(at(SpawnStep::Group))?;
        match own_group {
            Some(wanted) => gid = find_group(&content, wanted)?,
            None => groups.extend(memberships(&content, name).take(MAX_GROUPS)),
        }
        for wanted in added.iter() {
            if groups.len() >= MAX_GROUPS {
                return Err(SpawnError::new(SpawnStep::Group, Errno::EINVAL));
            }
            groups.push(find_group(&content, wanted.to_bytes())?);
        }
    }
    let home = if home.is_empty() { b"/" } else { home };
    Ok(Identity { uid, gid, groups, home: [b"HOME=", home].concat() })
}

/// A regular file's content, or none where there is no such file.
fn read(path: &CStr) -> Result<Vec<u8>, Errno> {
    let file = match sys::open(None, path, sys::O_RDONLY | sys::O_NONBLOCK) {
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(Vec::new()),
        file => file?,
    };
    if !sys::is_regular(&file)? {
        return Err(Errno::EINVAL);
    }
    let (mut content, mut piece) = (Vec::new(), [0u8; 4096]);
    loop {
        match sys::read(&file, &mut piece) {
            Ok(0) => return Ok(content),
            Ok(n) if content.len() + n > MAX_FILE => return Err(Errno::EFBIG),
            Ok(n) => content.extend_from_slice(piece.get(..n).unwrap_or_default()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Whether it can only be a number: an image that has it as a name means another user than who asks for it.
fn is_numeric(text: &[u8]) -> bool {
    !text.is_empty() && text.iter().all(u8::is_ascii_digit)
}

/// All but the last value, which means "unchanged" to the kernel.
fn number(text: &[u8]) -> Option<u32> {
    let digits = core::str::from_utf8(text).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))?;
    digits.parse().ok().filter(|&number| number != u32::MAX)
}

fn lines(content: &[u8]) -> impl Iterator<Item = &[u8]> {
    content.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty() && line[0] != b'#')
}

/// A line of `/etc/passwd` (passwd(5)).
struct User<'a> {
    name: &'a [u8],
    uid: Option<u32>,
    gid: Option<u32>,
    home: &'a [u8],
}

impl<'a> User<'a> {
    fn parse(line: &'a [u8]) -> Self {
        let mut fields = line.split(|&byte| byte == b':');
        let name = fields.next().unwrap_or_default();
        let (uid, gid) = (fields.nth(1).and_then(number), fields.next().and_then(number));
        Self { name, uid, gid, home: fields.nth(1).unwrap_or_default() }
    }

    /// A line that is damaged is no user's.
    fn is(&self, name: Option<&[u8]>, number: Option<u32>) -> bool {
        let found = match name {
            Some(name) => !name.is_empty() && self.name == name,
            None => number.is_some() && self.uid == number,
        };
        found && self.uid.is_some() && self.gid.is_some()
    }
}

/// Name, number and members of a line of `/etc/group` (group(5)).
fn group(line: &[u8]) -> Option<(&[u8], u32, &[u8])> {
    let mut fields = line.split(|&byte| byte == b':');
    let name = fields.next()?;
    let gid = fields.nth(1).and_then(number)?;
    Some((name, gid, fields.next().unwrap_or_default()))
}

fn find_group(content: &[u8], wanted: &[u8]) -> Result<u32, SpawnError> {
    let found = match is_numeric(wanted) {
        true => number(wanted),
        false => lines(content).filter_map(group).find(|(name, ..)| *name == wanted).map(|(_, gid, _)| gid),
    };
    found.ok_or_else(|| SpawnError::new(SpawnStep::Group, Errno::ENOENT))
}

fn memberships<'a>(content: &'a [u8], user: &'a [u8]) -> impl Iterator<Item = u32> {
    let lists = move |members: &[u8]| members.split(|&byte| byte == b',').any(|member| member == user);
    lines(content).filter_map(group).filter(move |(_, _, members)| lists(members)).map(|(_, gid, _)| gid)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/bash\n# a comment\n\nbroken\nhalf:x:1\nwww-data:x:33:33:www:/var/www:/sbin/nologin\n\
        1000:x:7:8::/named:\nworker:x:1000:1001::/home/worker:/bin/sh\nhomeless:x:5:5:::\nend:x:4294967294:9::/end:";
    const GROUP: &[u8] =
        b"root:x:0:\nbroken\n7:x:0:\nadm:x:4:root,www-data\nwww-data:x:33:\nssl:x:110:postgres,www-data,\nwww:x:111:www-data2";

    type Found = (u32, u32, Vec<u32>, String);

    fn identity(spec: &str) -> Result<Found, (SpawnStep, Errno)> {
        identity_with(spec, &[])
    }

    fn identity_with(spec: &str, groups: &[&str]) -> Result<Found, (SpawnStep, Errno)> {
        let mut added = crate::proto::StringBuf::new();
        groups.iter().for_each(|group| added.push(group.as_bytes()).unwrap());
        let found = identify(spec.as_bytes(), added.as_strings(), || Ok(PASSWD.to_vec()), || Ok(GROUP.to_vec()));
        let found = found.map_err(|error| (error.step, error.errno))?;
        Ok((found.uid, found.gid, found.groups, String::from_utf8(found.home).unwrap()))
    }

    #[test]
    fn users_have_the_ids_groups_and_home_of_the_files() {
        let home = |it: &str| format!("HOME={it}");
        assert_eq!(identity("root"), Ok((0, 0, vec![4], home("/root"))));
        assert_eq!(identity("www-data"), Ok((33, 33, vec![4, 110], home("/var/www"))));
        assert_eq!(identity("33"), identity("www-data"));
        assert_eq!(identity("www-data:ssl"), Ok((33, 110, vec![], home("/var/www"))));
        assert_eq!(identity("www-data:7"), Ok((33, 7, vec![], home("/var/www"))));
        assert_eq!(identity("www-data:"), identity("www-data"));
        assert_eq!(identity("homeless"), Ok((5, 5, vec![], home("/"))));
        assert_eq!(identity("end"), Ok((u32::MAX - 1, 9, vec![], home("/end"))));
        // A line that has the number as its name is not meant.
        assert_eq!(identity("1000"), Ok((1000, 1001, vec![], home("/home/worker"))));
        assert_eq!(identity("12345"), Ok((12_345, 0, vec![], home("/"))));
        assert_eq!(identity("12345:adm"), Ok((12_345, 4, vec![], home("/"))));
    }

    #[test]
    fn added_groups_are_found_by_name_and_number() {
        let groups = |spec, added: &[&str]| identity_with(spec, added).map(|(_, gid, groups, _)| (gid, groups));
        assert_eq!(groups("root", &["ssl", "7"]), Ok((0, vec![4, 110, 7])));
        assert_eq!(groups("12345:adm", &["www-data"]), Ok((4, vec![33])));
        assert_eq!(groups("12345", &["none"]), Err((SpawnStep::Group, Errno::ENOENT)));
    }

    #[test]
    fn unknown_names_are_refused_with_their_step() {
        for user in ["nobody", "", ":", "half", "broken", "-1", "4294967295", "root2", "#", "99999999999"] {
            assert_eq!(identity(user), Err((SpawnStep::User, Errno::ENOENT)), "{user}");
        }
        for user in ["root:none", "0:4294967295", "root:-1", "root:adm:x"] {
            assert_eq!(identity(user), Err((SpawnStep::Group, Errno::ENOENT)), "{user}");
        }
        let unreadable = identify(b"0", Strings::default(), || Err(Errno::EACCES), || Ok(Vec::new()));
        assert_eq!(unreadable.map_err(|error| error.step), Err(SpawnStep::User));
        // A number needs neither file.
        assert!(identify(b"7", Strings::default(), || Ok(Vec::new()), || Err(Errno::EACCES)).is_ok());
    }

    #[test]
    fn only_regular_files_are_read() {
        assert_eq!(read(c"/nowhere/passwd"), Ok(Vec::new()));
        assert_eq!(read(c"/dev/zero"), Err(Errno::EINVAL));
        assert_eq!(read(c"/proc"), Err(Errno::EINVAL));
        assert!(!read(c"/etc/passwd").unwrap().is_empty());
        let dir = std::env::temp_dir();
        let path = dir.join(format!("cofferdam-passwd-{}", std::process::id()));
        std::fs::write(&path, vec![b'x'; MAX_FILE + 1]).unwrap();
        let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
        assert_eq!(read(&name), Err(Errno::EFBIG));
        std::fs::remove_file(path).unwrap();
    }
}
