//! The form of a record: a hashed key and a value of fields of one size.
//!
//! A plain key-value store has no fields, so the fields are one after the other in the value of the
//! record's key.

use bytes::{Bytes, BytesMut};
use rand::Rng;

use super::database::DatabaseError;
use super::generator::{Uniform, fnv_hash};

/// The key of record `number`: `user` and a hash, so that records that are inserted one after the
/// other are scattered over the key space.
pub fn key(number: u64) -> Bytes {
    Bytes::from(format!("user{}", fnv_hash(number)))
}

/// How many fields a record has and how many bytes each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordShape {
    pub fields: usize,
    pub field_size: usize,
}

impl RecordShape {
    pub fn value_size(&self) -> usize {
        self.fields * self.field_size
    }

    /// A record with all its fields new.
    pub fn fill<R: Rng + ?Sized>(&self, random: &mut R) -> Bytes {
        let mut value = BytesMut::zeroed(self.value_size());
        fill_printable(&mut value, random);
        value.freeze()
    }

    /// The record `value` with a new value in one field, chosen at random.
    pub fn replace_field<R: Rng + ?Sized>(&self, value: &[u8], random: &mut R) -> Bytes {
        let mut value = BytesMut::from(value);
        let field = Uniform::new(0, self.fields as u64 - 1).next(random) as usize;
        let start = field * self.field_size;
        fill_printable(&mut value[start..start + self.field_size], random);
        value.freeze()
    }

    /// Checks that `value` has all the fields.
    pub fn check(&self, key: &Bytes, value: &[u8]) -> Result<(), DatabaseError> {
        if value.len() == self.value_size() {
            return Ok(());
        }
        Err(DatabaseError::Shape {
            key: key.clone(),
            expected: self.value_size(),
            found: value.len(),
        })
    }
}

/// Six random bits in each byte, as in YCSB, so that a value compresses somewhat.
fn fill_printable<R: Rng + ?Sized>(bytes: &mut [u8], random: &mut R) {
    random.fill_bytes(bytes);
    for byte in bytes {
        *byte = b' ' + (*byte & 63);
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::Xoshiro256PlusPlus;

    use super::*;

    const SHAPE: RecordShape = RecordShape { fields: 10, field_size: 100 };

    #[test]
    fn keys_are_those_of_ycsb() {
        assert_eq!(key(0), "user6284781860667377211");
        assert_eq!(key(1), "user8517097267634966620");
    }

    #[test]
    fn a_record_has_every_field_and_prints() {
        let value = SHAPE.fill(&mut Xoshiro256PlusPlus::seed_from_u64(1));
        assert!(SHAPE.check(&key(0), &value).is_ok());
        assert!(value.iter().all(|byte| (b' '..b' ' + 64).contains(byte)));
    }

    #[test]
    fn replacing_a_field_leaves_the_other_fields() {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(2);
        let before = SHAPE.fill(&mut random);
        let after = SHAPE.replace_field(&before, &mut random);
        let changed = before
            .chunks(SHAPE.field_size)
            .zip(after.chunks(SHAPE.field_size))
            .filter(|(before, after)| before != after)
            .count();
        assert_eq!((changed, after.len()), (1, before.len()));
    }

    #[test]
    fn a_record_of_another_shape_is_refused() {
        let error = SHAPE.check(&key(0), b"short").expect_err("5 bytes are no record");
        assert!(error.to_string().contains("5 bytes"), "{error}");
    }
}
