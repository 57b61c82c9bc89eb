//! [`Version`]: the number of the form in which a state is kept.
//!
//! It is the first field of what is kept, and is read before all others. So a newer state is refused by its number, whatever fields it has.

use std::fmt;
use std::marker::PhantomData;

#[cfg(feature = "serde")]
#[cfg_attr(not(test), allow(unused_imports, reason = "so far tests alone load what was kept"))]
pub(crate) use kept::load;

/// What is kept, and may have another form in another release.
pub(crate) trait Versioned {
    /// What it is, for errors.
    #[cfg_attr(not(feature = "serde"), allow(dead_code, reason = "nothing is loaded"))]
    const NAME: &'static str;
    /// The only version that this build writes and reads. A change of any of its fields makes another.
    const VERSION: u32;
}

/// The version of a `T`. There is only this build's: another one does not load.
pub(crate) struct Version<T>(PhantomData<fn() -> T>);

impl<T> Version<T> {
    pub(crate) const OURS: Self = Self(PhantomData);
}

impl<T> Clone for Version<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Version<T> {}

impl<T> PartialEq for Version<T> {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl<T> Eq for Version<T> {}

impl<T: Versioned> fmt::Debug for Version<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", T::VERSION)
    }
}

#[cfg(feature = "serde")]
mod kept {
    use std::cell::Cell;
    use std::fmt;

    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::{Version, Versioned};
    use crate::error::{Error, ErrorKind, Result};

    thread_local! {
        /// Why the last version was refused on this thread. Errors of formats are only text.
        static REFUSED: Cell<Option<String>> = const { Cell::new(None) };
    }

    impl<T: Versioned> Serialize for Version<T> {
        fn serialize<S: Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
            to.serialize_u32(T::VERSION)
        }
    }

    impl<'de, T: Versioned> Deserialize<'de> for Version<T> {
        fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
            let kept = u32::deserialize(from)?;
            if kept == T::VERSION {
                return Ok(Self::OURS);
            }
            let why = format!("{} has version {kept}, this build reads version {}", T::NAME, T::VERSION);
            REFUSED.set(Some(why.clone()));
            Err(D::Error::custom(why))
        }
    }

    /// Loads what was kept, by a format's `decode`.
    ///
    /// # Errors
    /// `Incompatible`, naming both versions, where a [`Version`] in it is another. `Corrupt` for all else that `decode` refuses.
    #[cfg_attr(not(test), allow(dead_code, reason = "so far tests alone load what was kept"))]
    pub(crate) fn load<T, E: fmt::Display>(decode: impl FnOnce() -> std::result::Result<T, E>) -> Result<T> {
        REFUSED.take();
        decode().map_err(|error| match REFUSED.take() {
            Some(why) => Error::new(ErrorKind::Incompatible, why),
            None => Error::new(ErrorKind::Corrupt, error.to_string()),
        })
    }
}

/// Checks that a state loads as it was kept, and that one of another version is refused by its number alone.
#[cfg(all(test, feature = "serde"))]
#[allow(clippy::unwrap_used, clippy::panic, reason = "a test's own check, which ends it")]
#[track_caller]
pub(crate) fn assert_versioned<T>(state: &T)
where
    T: Versioned + PartialEq + fmt::Debug + serde::Serialize + serde::de::DeserializeOwned,
{
    use crate::error::ErrorKind;

    let load = |text: &str| kept::load(|| serde_json::from_str::<T>(text));
    let text = serde_json::to_string(state).unwrap();
    assert_eq!(load(&text).unwrap(), *state);
    let ours = T::VERSION;
    let first = format!("{{\"version\":{ours},");
    let rest = text.strip_prefix(&first).unwrap_or_else(|| panic!("the version comes first: {text}"));
    for version in [0, ours + 1, u32::MAX] {
        // As it is, with a field more, and with nothing that is known.
        for rest in [rest, &format!("\"unknown\":1,{rest}"), "\"unknown\":[{}]}"] {
            let error = load(&format!("{{\"version\":{version},{rest}")).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
            let both = [format!("has version {version},"), format!("reads version {ours}"), T::NAME.into()];
            assert!(both.iter().all(|text| error.to_string().contains(text)), "{error}");
        }
    }
    // A field more or less of the same version, another kind of number, and a version that comes too late.
    for wrong in [
        format!("{first}\"unknown\":1,{rest}"),
        format!("{{{rest}"),
        format!("{{\"version\":-1,{rest}"),
        format!("{{\"version\":\"{ours}\",{rest}"),
    ] {
        let error = load(&wrong).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }
    assert_eq!(load(&text).unwrap(), *state, "what was refused before has no part in it");
}

#[cfg(all(test, feature = "serde"))]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        version: Version<Self>,
        value: u8,
    }

    impl Versioned for Inner {
        const NAME: &'static str = "the inner";
        const VERSION: u32 = 7;
    }

    #[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        version: Version<Self>,
        inner: Vec<Inner>,
    }

    impl Versioned for Outer {
        const NAME: &'static str = "the outer";
        const VERSION: u32 = 1;
    }

    fn outer() -> Outer {
        Outer { version: Version::OURS, inner: vec![Inner { version: Version::OURS, value: 3 }] }
    }

    #[test]
    fn another_version_is_refused_by_its_number() {
        assert_versioned(&outer());
    }

    #[test]
    fn another_version_inside_is_refused_by_its_number() {
        let text = serde_json::to_string(&outer()).unwrap();
        let newer = text.replace("\"version\":7,", "\"version\":8,\"more\":1,");
        let error = load(|| serde_json::from_str::<Outer>(&newer)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Incompatible);
        assert_eq!(error.to_string(), "the inner has version 8, this build reads version 7");
    }

    #[test]
    fn what_was_refused_before_is_not_reported_again() {
        assert!(serde_json::from_str::<Outer>("{\"version\":2}").is_err());
        let error = load(|| serde_json::from_str::<Outer>("{\"version\":1}")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }
}
