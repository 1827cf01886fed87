//! Which compression makes a stream the fastest, from what was measured. Pure: figures in, a choice out.
//!
//! While a thread packs the next frame the kernel sends the last one, so that a byte of the user takes as long as the
//! slower of the two: the processor (packing it, then sealing what remains of it) or the wire (carrying what remains of
//! it). [`Chooser`] keeps how fast each method packs and how much it leaves, from frames that were packed and from
//! samples of others, and how fast the wire is, and takes the method with the least time by that model. It changes only
//! for a gain of a tenth, so that noise does not make it swing.
//!
//! How fast the wire is can only be seen while it is what is waited for. When it is not, it was at least as fast as
//! what went through, and perhaps faster: then the figure drifts, so that a lighter method is tried now and then.

use std::time::Duration;

use crate::compress::Method;

/// What is chosen from, the lightest first.
const METHODS: [Method; 6] =
    [Method::None, Method::Lz4, Method::Zstd(-3), Method::Zstd(-1), Method::Zstd(1), Method::Zstd(3)];
/// Bytes of a frame that a sample packs.
pub(crate) const SAMPLE: usize = 16 << 10;
/// Samples take this part of the time at most: one in so much.
const SAMPLE_SHARE: u32 = 100;
/// The same when the last samples have shown that nothing is to be gained.
const HOPELESS_SHARE: u32 = 400;
/// Samples come no closer than this.
const LEAST_PAUSE: Duration = Duration::from_millis(2);
/// The wire's speed is taken over so much time at least.
const WINDOW: Duration = Duration::from_millis(20);
/// The wire is what is waited for when that takes this part of the time.
const WAITING: f64 = 0.1;
/// How fast the figure of a wire that is not waited for drifts, each window.
const DRIFT: f64 = 0.97;
/// A method must be this much faster than the present one.
const GAIN: f64 = 0.9;
/// A lighter method that takes so much longer at most is as good.
const AS_GOOD: f64 = 1.01;
/// How much a new figure counts against what was known.
const NEW: f64 = 0.3;

#[derive(Clone, Copy, Debug)]
struct Figures {
    /// Nanoseconds of processor to pack a byte.
    pack: f64,
    /// What is left of a byte.
    ratio: f64,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Chooser {
    current: usize,
    figures: [Option<Figures>; METHODS.len()],
    /// Nanoseconds that a byte takes on the wire; known once it was measured.
    wire: Option<f64>,
    /// Nanoseconds of processor to seal and write a byte.
    seal: f64,
    next_sample: Duration,
    to_sample: usize,
    window: Window,
}

#[derive(Debug, Default)]
struct Window {
    busy: Duration,
    waited: Duration,
    bytes: f64,
}

impl Chooser {
    pub(crate) fn new() -> Self {
        let mut figures = [None; METHODS.len()];
        figures[0] = Some(Figures { pack: 0.0, ratio: 1.0 });
        Self {
            current: 0,
            figures,
            wire: None,
            seal: 0.0,
            next_sample: Duration::ZERO,
            to_sample: 1,
            window: Window::default(),
        }
    }

    /// The method for the next frame.
    pub(crate) fn method(&self) -> Method {
        METHODS[self.current]
    }

    /// The method to try on a sample now, if it is time for one.
    pub(crate) fn wants_sample(&self, now: Duration) -> Option<Method> {
        (now >= self.next_sample).then_some(METHODS[self.to_sample])
    }

    /// A sample was packed with the method that was [wanted](Self::wants_sample).
    pub(crate) fn on_sample(&mut self, now: Duration, raw: usize, packed: usize, took: Duration) {
        self.learn(self.to_sample, raw, packed, took);
        self.to_sample = self.to_sample % (METHODS.len() - 1) + 1;
        let hopeless = self.figures[1..].iter().flatten().all(|figures| figures.ratio > 0.95);
        let share = if hopeless { HOPELESS_SHARE } else { SAMPLE_SHARE };
        self.next_sample = now + (took * share).max(LEAST_PAUSE);
    }

    /// A frame was packed with the chosen method.
    pub(crate) fn on_packed(&mut self, raw: usize, packed: usize, took: Duration) {
        self.window.busy += took;
        if self.current > 0 {
            self.learn(self.current, raw, packed, took);
        }
    }

    /// So many bytes were written: that took so much processor time, and so much more of waiting.
    pub(crate) fn on_written(&mut self, bytes: usize, processor: Duration, waited: Duration) {
        if bytes == 0 {
            return;
        }
        let seal = processor.as_nanos() as f64 / bytes as f64;
        self.seal = if self.seal == 0.0 { seal } else { mix(self.seal, seal) };
        self.window.busy += processor + waited;
        self.window.waited += waited;
        self.window.bytes += bytes as f64;
        if self.window.busy >= WINDOW {
            self.close_window();
            self.choose();
        }
    }

    fn learn(&mut self, index: usize, raw: usize, packed: usize, took: Duration) {
        if raw == 0 {
            return;
        }
        let new = Figures { pack: took.as_nanos() as f64 / raw as f64, ratio: packed as f64 / raw as f64 };
        self.figures[index] = Some(match self.figures[index] {
            Some(old) => Figures { pack: mix(old.pack, new.pack), ratio: mix(old.ratio, new.ratio) },
            None => new,
        });
    }

    fn close_window(&mut self) {
        let Window { busy, waited, bytes } = std::mem::take(&mut self.window);
        let each = busy.as_nanos() as f64 / bytes;
        self.wire = Some(if waited.as_secs_f64() > WAITING * busy.as_secs_f64() {
            self.wire.map_or(each, |wire| mix(wire, each))
        } else {
            self.wire.map_or(each, |wire| (wire * DRIFT).min(each))
        });
    }

    /// Nanoseconds for a byte of the user.
    fn time(&self, index: usize) -> Option<f64> {
        let Figures { pack, ratio } = self.figures[index]?;
        Some((pack + ratio * self.seal).max(ratio * self.wire?))
    }

    fn choose(&mut self) {
        let Some(present) = self.time(self.current) else { return };
        let times = || (0..METHODS.len()).filter_map(|index| Some((self.time(index)?, index)));
        let Some((best, index)) = times().min_by(|(one, _), (other, _)| one.total_cmp(other)) else { return };
        if best < GAIN * present {
            self.current = index;
        } else if let Some((_, lighter)) = times().find(|(time, _)| *time <= AS_GOOD * present) {
            // As fast with less work: never a heavier one, for the present one is as good as itself.
            self.current = lighter;
        }
    }
}

fn mix(old: f64, new: f64) -> f64 {
    old + NEW * (new - old)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: usize = 256 << 10;

    /// A stream in a model: what each method takes and leaves, and how fast the wire is.
    struct Model {
        /// Nanoseconds to pack a byte, and what is left, by method.
        methods: [(f64, f64); METHODS.len()],
        seal: f64,
        wire: f64,
        now: f64,
        sampling: f64,
        chooser: Chooser,
    }

    impl Model {
        fn new(methods: [(f64, f64); METHODS.len()], wire: f64) -> Self {
            Self { methods, seal: 0.4, wire, now: 0.0, sampling: 0.0, chooser: Chooser::new() }
        }

        fn index(method: Method) -> usize {
            METHODS.iter().position(|&other| other == method).unwrap()
        }

        /// Sends frames for this long; gives back the nanoseconds for a byte of the user.
        fn run(&mut self, seconds: f64) -> f64 {
            let (begun, mut sent) = (self.now, 0.0);
            while self.now < begun + seconds * 1e9 {
                let now = Duration::from_nanos(self.now as u64);
                if let Some(method) = self.chooser.wants_sample(now) {
                    let (pack, ratio) = self.methods[Self::index(method)];
                    let took = pack * SAMPLE as f64;
                    let (packed, took_time) = ((ratio * SAMPLE as f64) as usize, Duration::from_nanos(took as u64));
                    self.chooser.on_sample(now, SAMPLE, packed, took_time);
                    self.now += took;
                    self.sampling += took;
                }
                let (pack, ratio) = self.methods[Self::index(self.chooser.method())];
                let frame = FRAME as f64;
                let (packing, writing) = (pack * frame, ratio * self.seal * frame);
                let idle = (ratio * self.wire * frame - packing - writing).max(0.0);
                self.chooser.on_packed(FRAME, (ratio * frame) as usize, Duration::from_nanos(packing as u64));
                let duration = |nanoseconds: f64| Duration::from_nanos(nanoseconds as u64);
                self.chooser.on_written((ratio * frame) as usize, duration(writing), duration(idle));
                self.now += packing + writing + idle;
                sent += frame;
            }
            (self.now - begun) / sent
        }

        fn best(&self) -> f64 {
            let times = self.methods.iter().map(|(pack, ratio)| (pack + ratio * self.seal).max(ratio * self.wire));
            times.min_by(f64::total_cmp).unwrap()
        }
    }

    /// As shared libraries were measured: 0.8 GB/s and a ratio of 1.8 for lz4, and so on.
    const TEXT: [(f64, f64); 6] = [(0.0, 1.0), (1.25, 0.55), (1.3, 0.54), (1.6, 0.5), (2.2, 0.42), (3.3, 0.37)];
    const RANDOM: [(f64, f64); 6] = [(0.0, 1.0), (0.2, 1.0), (0.3, 1.0), (0.4, 1.0), (0.5, 1.0), (0.6, 1.0)];

    #[test]
    fn on_a_slow_wire_it_comes_close_to_the_best_method() {
        for wire in [8.0, 32.0, 100.0] {
            let mut model = Model::new(TEXT, wire);
            model.run(1.0);
            let (reached, best) = (model.run(1.0), model.best());
            assert!(reached < 1.12 * best, "{wire} ns a byte: {reached} where {best} is possible");
            assert!(reached < 0.6 * wire);
        }
    }

    #[test]
    fn on_a_fast_wire_it_leaves_bytes_as_they_are() {
        let mut model = Model::new(TEXT, 0.8);
        model.run(0.5);
        assert_eq!(model.chooser.method(), Method::None);
        assert!(model.run(1.0) < 1.03 * 0.8);
    }

    #[test]
    fn bytes_that_do_not_shrink_cost_less_than_three_in_a_hundred() {
        for wire in [0.5, 2.0, 8.0, 100.0] {
            let mut model = Model::new(RANDOM, wire);
            let reached = model.run(2.0);
            assert!(reached < 1.03 * wire, "{wire} ns a byte: {reached}");
            assert!(model.sampling < 0.01 * model.now);
        }
    }

    #[test]
    fn it_follows_a_wire_that_gets_slower_and_faster_again() {
        let mut model = Model::new(TEXT, 0.8);
        model.run(0.5);
        model.wire = 16.0;
        model.run(0.5);
        let (reached, best) = (model.run(0.5), model.best());
        assert!(reached < 1.12 * best, "{reached} where {best} is possible");
        model.wire = 0.8;
        model.run(2.0);
        assert_eq!(model.chooser.method(), Method::None);
    }

    #[test]
    fn it_follows_data_that_changes() {
        let mut model = Model::new(RANDOM, 8.0);
        model.run(0.5);
        assert_eq!(model.chooser.method(), Method::None);
        model.methods = TEXT;
        model.run(1.0);
        let (reached, best) = (model.run(0.5), model.best());
        assert!(reached < 1.12 * best, "{reached} where {best} is possible");
        model.methods = RANDOM;
        model.run(1.0);
        assert_eq!(model.chooser.method(), Method::None);
    }
}
