//! What a process or thread has used of the processors (`/proc/PID/stat`, man 5 proc).

/// One line of it.
pub(crate) struct Stat {
    pub(crate) name: String,
    pub(crate) parent: u32,
    /// What itself has used, in seconds.
    pub(crate) own_s: f64,
    /// And its children that ended.
    pub(crate) with_children_s: f64,
}

impl Stat {
    /// `path` is that of the file. None when it has ended.
    pub(crate) fn read(path: &str) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(path).ok()?)
    }

    /// Fields are counted after the name, which may hold anything.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let (before, after) = line.rsplit_once(") ")?;
        let fields: Vec<&str> = after.split(' ').collect();
        let mut ticks = fields.get(11..15)?.iter().map(|field| field.parse::<u64>());
        let mut two = || Some(ticks.next()?.ok()? + ticks.next()?.ok()?);
        let (own, children) = (two()?, two()?);
        let seconds = |ticks: u64| ticks as f64 / rustix::param::clock_ticks_per_second() as f64;
        Some(Self {
            name: before.split_once('(')?.1.to_owned(),
            parent: fields.get(1)?.parse().ok()?,
            own_s: seconds(own),
            with_children_s: seconds(own + children),
        })
    }
}
