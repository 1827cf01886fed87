//! Small values that a command line and a configuration are made of.

use std::net::{Ipv6Addr, SocketAddr};

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The port that agents listen on unless told otherwise.
pub const DEFAULT_PORT: u16 = 7420;

/// Where other agents are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Listen {
    /// Nowhere: this host takes no VMs, but may hand some over.
    Nowhere,
    /// Here.
    At(SocketAddr),
}

impl Default for Listen {
    /// On every address that the host has.
    fn default() -> Self {
        Self::At((Ipv6Addr::UNSPECIFIED, DEFAULT_PORT).into())
    }
}

impl std::str::FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self::Nowhere);
        }
        let address = text.parse().map(Self::At);
        address
            .map_err(|_| format!("{text:?} is no ADDRESS:PORT such as 192.0.2.1:7420 or [::]:7420, and not \"none\""))
    }
}

impl TryFrom<String> for Listen {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// How the bytes of guests are protected on their way. Agents themselves never talk without TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Security {
    /// TLS 1.3.
    #[default]
    Tls,
    /// Not at all: the network is trusted. Both hosts must say so.
    Plain,
}

/// Bytes a second, from `100MiB/s`, `1Gbit/s`, `1gbit` and the like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Rate(pub u64);

impl std::str::FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is no rate; give one such as 100MiB/s or 1Gbit/s");
        let lower = text.trim().to_ascii_lowercase();
        let amount = lower.strip_suffix("/s").unwrap_or(&lower);
        if let Some(bits) = amount.strip_suffix("bit") {
            let (number, factor) = match bits.chars().last() {
                Some('k') => (&bits[..bits.len() - 1], 1e3),
                Some('m') => (&bits[..bits.len() - 1], 1e6),
                Some('g') => (&bits[..bits.len() - 1], 1e9),
                _ => (bits, 1.0),
            };
            let number: f64 = number.trim().parse().map_err(|_| bad())?;
            return if number >= 0.0 { Ok(Self((number * factor / 8.0) as u64)) } else { Err(bad()) };
        }
        amount.parse::<ByteSize>().map(|size| Self(size.as_u64())).map_err(|_| bad())
    }
}

impl TryFrom<String> for Rate {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::Rate;

    #[test]
    fn rates_may_be_given_in_bits_or_bytes() {
        for (text, bytes) in [
            ("1Gbit/s", 125_000_000),
            ("1gbit", 125_000_000),
            ("8kbit", 1000),
            ("100MiB/s", 100 << 20),
            ("5000000", 5_000_000),
        ] {
            assert_eq!(text.parse(), Ok(Rate(bytes)), "{text}");
        }
        for bad in ["", "fast", "-1gbit", "-5", "1 parsec", "gbit"] {
            assert!(bad.parse::<Rate>().is_err(), "{bad}");
        }
    }
}
