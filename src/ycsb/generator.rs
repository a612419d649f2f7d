//! The number generators of YCSB: which records are requested, and how often.
//!
//! A generator takes a source of randomness at each call and holds none itself. So one generator,
//! whose set-up costs a sum over all records, is built once and cloned for every client.

use rand::{Rng, RngExt};

/// YCSB's zipfian constant: the larger, the more of the requests go to the head.
pub const THETA: f64 = 0.99;

/// The item space that [`ScrambledZipfian`] draws ranks from before it hashes them
/// onto the records, and that space's zeta sum. YCSB fixes both, so that the skew
/// does not depend on the number of records and the sum needs no computing.
const SCRAMBLED_RANKS: u64 = 10_000_000_000;
const SCRAMBLED_ZETA: f64 = 26.469_028_201_783_02;

const FNV_OFFSET_BASIS: u64 = 0xCBF2_9CE4_8422_2325;
const FNV_PRIME: u64 = 1_099_511_628_211;

/// FNV-1a over the eight octets of `number`, lowest first, made non-negative as a signed 64-bit
/// number, as YCSB's Java code does it.
pub fn fnv_hash(number: u64) -> u64 {
    let hash = number
        .to_le_bytes()
        .iter()
        .fold(FNV_OFFSET_BASIS, |hash, octet| (hash ^ u64::from(*octet)).wrapping_mul(FNV_PRIME));
    (hash as i64).unsigned_abs()
}

/// Whole numbers from `low` to `high`, both included, all equally likely.
#[derive(Debug, Clone, Copy)]
pub struct Uniform {
    low: u64,
    high: u64,
}

impl Uniform {
    pub fn new(low: u64, high: u64) -> Self {
        assert!(low <= high, "a uniform range starts at or below its end");
        Uniform { low, high }
    }

    pub fn next<R: Rng + ?Sized>(&self, random: &mut R) -> u64 {
        random.random_range(self.low..=self.high)
    }
}

/// Ranks `0..items` with rank 0 the most likely: Gray et al., "Quickly Generating Billion-Record
/// Synthetic Databases" (SIGMOD 1994). Ranks 0 and 1 have exactly their share. The others follow a
/// closed form that comes near theirs.
#[derive(Debug, Clone)]
pub struct Zipfian {
    items: u64,
    zeta: f64,
    eta: f64,
}

impl Zipfian {
    /// Computes one power for each item.
    pub fn new(items: u64) -> Self {
        Self::with_zeta(items, zeta(0, items, 0.0))
    }

    /// `zeta` is the sum of `1 / rank^THETA` for ranks 1 to `items`.
    fn with_zeta(items: u64, zeta: f64) -> Self {
        assert!(items > 0, "a zipfian distribution has at least one item");
        let mut this = Zipfian { items, zeta, eta: 0.0 };
        this.eta = this.eta();
        this
    }

    fn eta(&self) -> f64 {
        let tail = (2.0 / self.items as f64).powf(1.0 - THETA);
        (1.0 - tail) / (1.0 - zeta(0, 2, 0.0) / self.zeta)
    }

    /// Extends the ranks to `items`, with one power for each new item. Records are only ever added,
    /// so a lower number changes nothing.
    pub fn grow(&mut self, items: u64) {
        if items > self.items {
            self.zeta = zeta(self.items, items, self.zeta);
            self.items = items;
            self.eta = self.eta();
        }
    }

    pub fn next<R: Rng + ?Sized>(&self, random: &mut R) -> u64 {
        let u: f64 = random.random();
        let scaled = u * self.zeta;
        if scaled < 1.0 {
            return 0;
        }
        if scaled < 1.0 + 0.5_f64.powf(THETA) {
            return 1.min(self.items - 1);
        }
        let base = self.eta * u - self.eta + 1.0;
        let rank = self.items as f64 * base.powf(1.0 / (1.0 - THETA));
        // Rounding may reach the end of the open interval.
        (rank as u64).min(self.items - 1)
    }
}

/// Continues the sum of `1 / rank^THETA` from `from` items to `to` items.
fn zeta(from: u64, to: u64, sum: f64) -> f64 {
    (from..to).fold(sum, |sum, index| sum + ((index + 1) as f64).powf(THETA).recip())
}

/// Zipfian popularity, with the popular items scattered over `0..items` by a hash,
/// so that they do not all lie in one region.
#[derive(Debug, Clone)]
pub struct ScrambledZipfian {
    items: u64,
    ranks: Zipfian,
}

impl ScrambledZipfian {
    pub fn new(items: u64) -> Self {
        assert!(items > 0, "a zipfian distribution has at least one item");
        ScrambledZipfian { items, ranks: Zipfian::with_zeta(SCRAMBLED_RANKS, SCRAMBLED_ZETA) }
    }

    pub fn next<R: Rng + ?Sized>(&self, random: &mut R) -> u64 {
        fnv_hash(self.ranks.next(random)) % self.items
    }
}

/// Items by age: the newest is the most likely, with a zipfian tail to the oldest.
#[derive(Debug, Clone)]
pub struct SkewedLatest {
    ages: Zipfian,
}

impl SkewedLatest {
    pub fn new(items: u64) -> Self {
        SkewedLatest { ages: Zipfian::new(items) }
    }

    /// `items` is the number of records that exist now.
    pub fn next<R: Rng + ?Sized>(&mut self, items: u64, random: &mut R) -> u64 {
        assert!(items > 0, "the latest of no records cannot be chosen");
        self.ages.grow(items);
        items - 1 - self.ages.next(random).min(items - 1)
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::Xoshiro256PlusPlus;

    use super::*;

    const DRAWS: u64 = 200_000;

    fn random() -> Xoshiro256PlusPlus {
        Xoshiro256PlusPlus::seed_from_u64(17)
    }

    fn share(count: u64) -> f64 {
        count as f64 / DRAWS as f64
    }

    fn assert_near(measured: f64, analytic: f64, tolerance: f64) {
        assert!(
            (measured - analytic).abs() < tolerance,
            "measured {measured}, expected {analytic} within {tolerance}"
        );
    }

    #[test]
    fn fnv_hash_agrees_with_the_keys_that_ycsb_prints() {
        assert_eq!(fnv_hash(0), 6_284_781_860_667_377_211);
        assert_eq!(fnv_hash(1), 8_517_097_267_634_966_620);
    }

    #[test]
    fn the_zeta_sum_is_the_same_computed_at_once_or_step_by_step() {
        let mut grown = Zipfian::new(10);
        for items in [11, 400, 5_000] {
            grown.grow(items);
        }
        let whole = Zipfian::new(5_000);
        assert_near(grown.zeta, whole.zeta, 1e-9);
        assert_near(grown.eta, whole.eta, 1e-9);
    }

    #[test]
    fn zipfian_ranks_have_their_analytic_share() {
        const ITEMS: u64 = 10_000;
        let zipfian = Zipfian::new(ITEMS);
        let mut random = random();
        let mut counts = vec![0_u64; ITEMS as usize];
        for _ in 0..DRAWS {
            counts[zipfian.next(&mut random) as usize] += 1;
        }
        let all = zeta(0, ITEMS, 0.0);
        // The tolerance is three standard deviations of the first two shares, which are exact.
        assert_near(share(counts[0]), 1.0 / all, 0.003);
        assert_near(share(counts[1]), 0.5_f64.powf(THETA) / all, 0.002);
        // The closed form overstates the middle a little, in YCSB as here.
        for head in [10, 100, 1_000] {
            let measured = share(counts[..head as usize].iter().sum());
            assert_near(measured, zeta(0, head, 0.0) / all, 0.02);
        }
    }

    #[test]
    fn scrambling_keeps_the_skew_and_scatters_the_popular_items() {
        const ITEMS: u64 = 1_000;
        let scrambled = ScrambledZipfian::new(ITEMS);
        let mut random = random();
        let mut counts = vec![0_u64; ITEMS as usize];
        for _ in 0..DRAWS {
            counts[scrambled.next(&mut random) as usize] += 1;
        }
        let first = (fnv_hash(0) % ITEMS) as usize;
        let second = (fnv_hash(1) % ITEMS) as usize;
        let most = counts.iter().max().copied();
        assert_eq!(most, Some(counts[first]), "the most popular is where rank 0 hashes to");
        // Besides its own rank, an item has a thin share of the long tail.
        assert_near(share(counts[first]), 1.0 / SCRAMBLED_ZETA, 0.003);
        assert_near(share(counts[second]), 0.5_f64.powf(THETA) / SCRAMBLED_ZETA, 0.003);
        assert!(first.abs_diff(second) > 1, "neighbours in rank are not neighbours in place");
    }

    #[test]
    fn the_latest_record_is_the_most_popular_also_after_inserts() {
        let mut latest = SkewedLatest::new(1_000);
        let mut random = random();
        for items in [1_000_u64, 1_500] {
            let mut newest = 0;
            let mut newest_tenth = 0;
            for _ in 0..DRAWS {
                let chosen = latest.next(items, &mut random);
                assert!(chosen < items);
                newest += u64::from(chosen == items - 1);
                newest_tenth += u64::from(chosen >= items - items / 10);
            }
            let all = zeta(0, items, 0.0);
            assert_near(share(newest), 1.0 / all, 0.004);
            assert_near(share(newest_tenth), zeta(0, items / 10, 0.0) / all, 0.03);
        }
    }

    #[test]
    fn few_items_are_drawn_within_their_range() {
        let mut random = random();
        for items in 1..=5 {
            let zipfian = Zipfian::new(items);
            let mut seen = vec![false; items as usize];
            for _ in 0..2_000 {
                seen[zipfian.next(&mut random) as usize] = true;
            }
            assert!(seen[0]);
            assert!(items == 1 || seen[1], "the second of {items} items is drawn");
        }
    }

    #[test]
    fn uniform_numbers_reach_both_ends_equally_often() {
        let uniform = Uniform::new(1, 100);
        let mut random = random();
        let mut counts = [0_u64; 101];
        for _ in 0..DRAWS {
            counts[uniform.next(&mut random) as usize] += 1;
        }
        assert_eq!(counts[0], 0);
        for count in &counts[1..] {
            assert_near(share(*count), 0.01, 0.0012);
        }
    }
}
