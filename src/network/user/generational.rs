//! [`GenerationalMap`]: a slab with generational keys. A key is never reused for another value.

/// Names one value of one [`GenerationalMap`]; of a value that is gone, nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(in crate::network) struct Id {
    index: u32,
    /// How often the place was used before, in 24 bits: enough to tell a late event from one of a new value.
    generation: u32,
}

impl Id {
    /// Of something that has no name yet.
    pub(in crate::network) const NONE: Self = Self { index: u32::MAX, generation: 0 };
}

/// What a descriptor belongs to, in what is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::network) enum Owner {
    Timer,
    Router,
    Tcp(Id),
    Udp(Id),
    Listener(Id),
    Resolver(Id),
    Client(Id),
    Fragments,
    /// Of a switch.
    Queue,
}

impl Owner {
    /// As a number for epoll.
    pub(in crate::network) fn token(self) -> u64 {
        let none = Id { index: 0, generation: 0 };
        let (kind, id) = match self {
            Self::Timer => (0, none),
            Self::Router => (6, none),
            Self::Queue => (7, none),
            Self::Fragments => (8, none),
            Self::Tcp(id) => (1, id),
            Self::Udp(id) => (2, id),
            Self::Listener(id) => (3, id),
            Self::Resolver(id) => (4, id),
            Self::Client(id) => (5, id),
        };
        kind << 56 | u64::from(id.generation) << 32 | u64::from(id.index)
    }

    pub(in crate::network) fn of(token: u64) -> Option<Self> {
        let id = Id { index: token as u32, generation: (token >> 32) as u32 & GENERATIONS };
        match token >> 56 {
            0 => Some(Self::Timer),
            1 => Some(Self::Tcp(id)),
            2 => Some(Self::Udp(id)),
            3 => Some(Self::Listener(id)),
            4 => Some(Self::Resolver(id)),
            5 => Some(Self::Client(id)),
            6 => Some(Self::Router),
            7 => Some(Self::Queue),
            8 => Some(Self::Fragments),
            _ => None,
        }
    }
}

const GENERATIONS: u32 = 0xff_ffff;

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    value: Option<T>,
}

#[derive(Debug)]
pub(in crate::network) struct GenerationalMap<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

impl<T> Default for GenerationalMap<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new() }
    }
}

impl<T> GenerationalMap<T> {
    pub(in crate::network) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(in crate::network) fn insert(&mut self, value: T) -> Id {
        let index = self.free.pop().unwrap_or(self.slots.len() as u32);
        match self.slots.get_mut(index as usize) {
            Some(slot) => {
                slot.value = Some(value);
                Id { index, generation: slot.generation }
            }
            None => {
                self.slots.push(Slot { generation: 0, value: Some(value) });
                Id { index, generation: 0 }
            }
        }
    }

    pub(in crate::network) fn get(&self, id: Id) -> Option<&T> {
        let slot = self.slots.get(id.index as usize)?;
        slot.value.as_ref().filter(|_| slot.generation == id.generation)
    }

    pub(in crate::network) fn get_mut(&mut self, id: Id) -> Option<&mut T> {
        let slot = self.slots.get_mut(id.index as usize)?;
        slot.value.as_mut().filter(|_| slot.generation == id.generation)
    }

    pub(in crate::network) fn remove(&mut self, id: Id) -> Option<T> {
        let slot = self.slots.get_mut(id.index as usize).filter(|slot| slot.generation == id.generation)?;
        let value = slot.value.take()?;
        slot.generation = (slot.generation + 1) & GENERATIONS;
        self.free.push(id.index);
        Some(value)
    }

    pub(in crate::network) fn iter(&self) -> impl Iterator<Item = (Id, &T)> {
        let id = |(index, slot): (usize, &Slot<T>)| Id { index: index as u32, generation: slot.generation };
        self.slots.iter().enumerate().filter_map(move |at| Some((id(at), at.1.value.as_ref()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_removed_values_are_stale() {
        let mut table = GenerationalMap::default();
        let (a, b) = (table.insert('a'), table.insert('b'));
        assert_eq!(table.remove(a), Some('a'));
        let c = table.insert('c');
        assert_eq!((table.remove(a), table.get_mut(a)), (None, None));
        assert_eq!(table.get_mut(c), Some(&mut 'c'));
        assert_eq!((table.len(), table.iter().count(), table.get_mut(b)), (2, 2, Some(&mut 'b')));
        for owner in [Owner::Timer, Owner::Tcp(c), Owner::Udp(b)] {
            assert_eq!(Owner::of(owner.token()), Some(owner));
        }
        assert_eq!(Owner::of(u64::MAX), None);
    }
}
