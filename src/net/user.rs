//! Whether a user id that the kernel reports (`SO_PEERCRED` of unix(7)) names a user.
//!
//! To a service with a user namespace of its own (`PrivateUsers=` of systemd.exec(5)) the kernel
//! reports every user outside the namespace as the overflow id, 65534 (user_namespaces(7)). That is
//! no user's id, and must not be logged as one.

use std::fs;
use std::sync::OnceLock;

/// The ids of the namespace: first id and count.
type Mapped = Vec<(u32, u32)>;

/// The user id, if our user namespace has this user.
#[must_use]
pub fn visible_user(uid: u32) -> Option<u32> {
    static MAPPED: OnceLock<Option<Mapped>> = OnceLock::new();
    let mapped = MAPPED.get_or_init(|| fs::read_to_string("/proc/self/uid_map").ok().map(mapped));
    // A kernel without user namespaces has no such file, and no overflow id.
    mapped.as_ref().is_none_or(|mapped| is_mapped(uid, mapped)).then_some(uid)
}

/// Parses `uid_map`: each line has the first id inside, the first id outside, and the count.
fn mapped(text: impl AsRef<str>) -> Mapped {
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        let first = words.next()?.parse().ok()?;
        Some((first, words.nth(1)?.parse().ok()?))
    };
    text.as_ref().lines().filter_map(line).collect()
}

fn is_mapped(uid: u32, mapped: &Mapped) -> bool {
    mapped.iter().any(|(first, count)| uid.checked_sub(*first).is_some_and(|at| at < *count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_user_is_visible_in_the_initial_namespace() {
        let all = mapped("         0          0 4294967295\n");
        assert!([0, 1000, 65_534, u32::MAX - 1].into_iter().all(|uid| is_mapped(uid, &all)));
    }

    #[test]
    fn the_overflow_id_names_no_user_of_a_private_namespace() {
        let private =
            mapped("         0          0          1\n       998        998          1\n");
        let visible = |uid| is_mapped(uid, &private);
        assert!(visible(0) && visible(998));
        assert!(!visible(1) && !visible(997) && !visible(999) && !visible(65_534));
    }

    #[test]
    fn invalid_lines_map_nothing() {
        assert_eq!(mapped("\nx 0 1\n5\n7 7\n9 9 2\n"), [(9, 2)]);
    }
}
