//! The randomness of everything in a simulation comes from its seed.
//!
//! Hash maps, random ids and the scheduler's choices all begin with bytes from the operating
//! system. This file takes the system's place: on a thread that was given a seed, `getrandom`
//! answers from a generator. So each seed runs on a thread of its own, and the code that is
//! simulated needs no other source of randomness than in production.

use std::cell::RefCell;

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

thread_local! {
    static STREAM: RefCell<Option<ChaCha8Rng>> = const { RefCell::new(None) };
}

/// From now on this thread's randomness comes from `seed`. To be called before the thread has
/// asked for any.
pub fn seed_thread(seed: u64) {
    STREAM.with(|stream| *stream.borrow_mut() = Some(ChaCha8Rng::seed_from_u64(seed)));
}

/// Fills `bytes` from the thread's generator, if it has one.
fn fill(bytes: &mut [u8]) -> bool {
    let filled = STREAM.try_with(|stream| match stream.try_borrow_mut().as_deref_mut() {
        Ok(Some(stream)) => {
            stream.fill_bytes(bytes);
            true
        }
        Ok(None) | Err(_) => false,
    });
    filled.unwrap_or(false)
}

/// Takes the place of the C library's function of this name.
///
/// # Safety
/// As there: `buffer` must be valid for writes of `length` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(
    buffer: *mut libc::c_void,
    length: usize,
    flags: libc::c_uint,
) -> isize {
    // SAFETY: the caller promises that the buffer is writable; zeroed, it is initialised as well.
    let bytes = unsafe {
        std::ptr::write_bytes(buffer.cast::<u8>(), 0, length);
        std::slice::from_raw_parts_mut(buffer.cast::<u8>(), length)
    };
    if fill(bytes) {
        return length.cast_signed();
    }
    // SAFETY: the arguments are those of this function, which are the system call's.
    unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) as isize }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::hash::BuildHasher as _;

    use super::*;

    fn drawn(seed: Option<u64>) -> (u64, u64) {
        let drawing = move || {
            if let Some(seed) = seed {
                seed_thread(seed);
            }
            let map: HashMap<u8, u8> = HashMap::new();
            (map.hasher().hash_one(7), rand::random::<u64>())
        };
        std::thread::spawn(drawing).join().expect("it draws")
    }

    #[test]
    fn a_thread_with_a_seed_draws_the_same_again_and_another_does_not() {
        let (hash, number) = drawn(Some(1));
        assert_eq!(drawn(Some(1)), (hash, number));
        let (other_hash, other_number) = drawn(Some(2));
        assert!(other_hash != hash && other_number != number);
        let (system_hash, system_number) = drawn(None);
        assert!(system_hash != hash && system_number != number);
    }
}
