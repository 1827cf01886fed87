//! libvirt's typed parameters: names with values of several types.

use crate::xdr::{Decoder, Encoder, Malformed};

/// So many at most: a domain with many disks has one for each of some things.
const MOST: usize = 4096;

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `int`.
    Int(i32),
    /// `unsigned int`.
    UInt(u32),
    /// `long long`.
    Long(i64),
    /// `unsigned long long`.
    ULong(u64),
    /// `double`.
    Double(f64),
    /// `bool`.
    Bool(bool),
    /// A text.
    Text(String),
}

/// A name and its value; a name may come more than once.
#[derive(Clone, Debug, PartialEq)]
pub struct Param {
    /// In libvirt's words.
    pub name: String,
    /// Its value.
    pub value: Value,
}

impl Param {
    /// With a number.
    pub fn number(name: &str, value: u64) -> Self {
        Self { name: name.into(), value: Value::ULong(value) }
    }

    /// With a text.
    pub fn text(name: &str, value: impl Into<String>) -> Self {
        Self { name: name.into(), value: Value::Text(value.into()) }
    }
}

/// Several.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Params(pub Vec<Param>);

impl Params {
    /// Those of this name.
    fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Value> {
        self.0.iter().filter(move |it| it.name == name).map(|it| &it.value)
    }

    /// The number of this name, if there is one that is not negative.
    pub fn number(&self, name: &str) -> Option<u64> {
        match *self.all(name).next()? {
            Value::Int(it) => it.try_into().ok(),
            Value::UInt(it) => Some(it.into()),
            Value::Long(it) => it.try_into().ok(),
            Value::ULong(it) => Some(it),
            Value::Bool(it) => Some(it.into()),
            Value::Double(_) | Value::Text(_) => None,
        }
    }

    /// The texts of this name.
    pub fn texts<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.all(name).filter_map(|it| match it {
            Value::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    pub(crate) fn encode(&self, to: &mut Encoder) {
        to.u32(self.0.len() as u32);
        for Param { name, value } in &self.0 {
            to.string(name);
            match value {
                Value::Int(it) => to.u32(1).i32(*it),
                Value::UInt(it) => to.u32(2).u32(*it),
                Value::Long(it) => to.u32(3).u64(it.cast_unsigned()),
                Value::ULong(it) => to.u32(4).u64(*it),
                Value::Double(it) => to.u32(5).u64(it.to_bits()),
                Value::Bool(it) => to.u32(6).u32((*it).into()),
                Value::Text(it) => to.u32(7).string(it),
            };
        }
    }

    pub(crate) fn decode(from: &mut Decoder<'_>) -> Result<Self, Malformed> {
        let one = |from: &mut Decoder<'_>| {
            let name = from.string()?.to_owned();
            let value = match from.u32()? {
                1 => Value::Int(from.i32()?),
                2 => Value::UInt(from.u32()?),
                3 => Value::Long(from.u64()?.cast_signed()),
                4 => Value::ULong(from.u64()?),
                5 => Value::Double(f64::from_bits(from.u64()?)),
                6 => Value::Bool(from.bool()?),
                7 => Value::Text(from.string()?.to_owned()),
                value => return Err(Malformed::Unknown { what: "parameter's type", value }),
            };
            Ok(Param { name, value })
        };
        from.list(MOST, one).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_come_out_as_they_went_in_and_a_type_that_nobody_knows_is_an_error() {
        let values = [
            Value::Int(-1),
            Value::UInt(2),
            Value::Long(-3),
            Value::ULong(1 << 60),
            Value::Double(0.5),
            Value::Bool(true),
            Value::Text("vda".into()),
        ];
        let all = Params(values.map(|value| Param { name: "x".into(), value }).into());
        let mut made = Encoder::new();
        all.encode(&mut made);
        let made = made.finish();
        assert_eq!(Params::decode(&mut Decoder::new(&made)).unwrap(), all);
        assert_eq!(all.number("x"), None, "the first is negative");
        assert_eq!(all.texts("x").collect::<Vec<_>>(), ["vda"]);
        let mut bad = Encoder::new();
        bad.u32(1).string("x").u32(9).u32(0);
        let unknown = Malformed::Unknown { what: "parameter's type", value: 9 };
        assert_eq!(Params::decode(&mut Decoder::new(&bad.finish())), Err(unknown));
    }
}
