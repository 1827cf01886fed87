//! What a process or thread has used of the processors (`/proc/PID/stat`, man 5 proc).

/// One line of it.
pub struct Stat {
    /// Its name.
    pub name: String,
    /// The process that started it.
    pub parent: u32,
    /// What itself has used, in seconds.
    pub own_s: f64,
    /// And its children that ended.
    pub with_children_s: f64,
}

impl Stat {
    /// `path` is that of the file. None when it has ended.
    pub fn read(path: &str) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(path).ok()?)
    }

    /// Of the text of one. Fields are counted after the name, which may hold anything.
    pub fn parse(line: &str) -> Option<Self> {
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
