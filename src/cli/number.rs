//! Whole numbers on the command line.

use clap::builder::TypedValueParser;

/// A whole number from `least` to `most`.
pub fn whole<T>(least: T, most: T) -> impl TypedValueParser<Value = T>
where
    T: Copy + PartialOrd + TryFrom<u64> + Into<u64> + Send + Sync + 'static,
{
    move |typed: &str| {
        let number: Option<T> = typed.parse().ok().and_then(|number: u64| number.try_into().ok());
        let number = number.filter(|number| (least..=most).contains(number));
        number
            .ok_or_else(|| format!("write a whole number from {} to {}", least.into(), most.into()))
    }
}
