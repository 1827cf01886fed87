//! The plan of a move: everything that can be refused is refused here, by this host and by the other, and nothing is
//! touched yet.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use uuid::Uuid;
use vmferry_api::{VmMoveDisk, VmMoveRequest, VmSpec, in_one_line};
use vmferry_link::Fingerprint;
use vmferry_nbd::backend::{Access, File};
use vmferry_qemu::{CommandLine, ImageWords, Qcow2};

use crate::engine::{Protection, Setup};
use crate::error::AgentError;
use crate::host::{Host, Idle, IdleVm, Markers, Placed, Places, plugs};
use crate::journal::{VmRecord, Written};
use crate::peers::{MoveOffer, Offer, OwnImage, Peer, trust};
use crate::source::contents_of;

/// How many images may be behind one another.
const LONGEST_CHAIN: usize = 64;

/// What planning found out.
pub(super) struct Plan {
    pub(super) record: VmRecord,
    pub(super) offer: MoveOffer,
    /// The other host, as it calls itself.
    pub(super) to: String,
    pub(super) peer: Peer,
    pub(super) peer_key: Fingerprint,
    /// Those that are copied.
    pub(super) disks: Vec<Leaving>,
    pub(super) notes: Vec<String>,
    /// The other host looks for them until it has all.
    _markers: Markers,
}

/// A disk that is copied.
pub(super) struct Leaving {
    /// Where it is here, and where it is to be there.
    pub(super) disk: VmMoveDisk,
    /// Nobody writes it meanwhile.
    _lock: File,
}

/// What is known of an image of which a copy can be made.
struct Image {
    format: String,
    size: u64,
    allocated: u64,
    is_file: bool,
    /// What is behind it is found from where it is, or said by the VM's words.
    is_bound: bool,
    behind: Vec<PathBuf>,
}

fn refused(name: &str, reason: &str, hint: &str) -> AgentError {
    AgentError::Conflict {
        message: format!("{name} cannot be moved: {reason}"),
        hint: (!hint.is_empty()).then(|| hint.into()),
    }
}

/// Looks at everything. Nobody starts the VM meanwhile.
pub(super) async fn plan(host: &Host, name: &str, id: Uuid, request: &VmMoveRequest) -> Result<Plan, AgentError> {
    let record = movable(host, name)?;
    let mut spec = record.spec.clone();
    if let Some(changed) = &record.changed {
        spec.argv.clone_from(&changed.argv);
        spec.io_limits.clone_from(&changed.io_limits);
    }
    let found = trust::find_peer(host, &request.to).await?;
    let met = found.hello().await?;
    let peer = found.pinned_to(&met);
    // The disks may lie on storage that does not answer, which must not keep others waiting.
    let (of, signature) = (spec.clone(), host.signature.clone());
    let (shared, wanted) = (request.disks_are_shared, request.disks.clone());
    let look = move || {
        let (images, known) = images_of(&of, shared)?;
        let places = Places::of(&of.name, &wanted, &known)?;
        let behind: Vec<PathBuf> = images.values().flat_map(|it| it.behind.clone()).collect();
        Ok::<_, AgentError>((images, places, Markers::put(&of, &behind, id, &signature)?))
    };
    let (images, places, markers) = tokio::task::spawn_blocking(look).await.expect("looking does not panic")?;
    let mut offer = offer(host, id, &record, spec, &markers, request)?;
    offer.vm.spec.argv = places.words(name, &offer.vm.spec.argv, &[])?;
    offer.vm.disks = markers.disks().iter().map(|disk| places.there(disk)).collect();
    let offered = |(here, image): (&PathBuf, &Image)| {
        let there = places.there(here);
        let is_named = places.is_named(&there);
        if is_named && image.is_bound {
            let reason = format!("what is behind {} is named by where that is", here.display());
            return Err(refused(name, &reason, "leave it at its path"));
        }
        Ok((is_named || image.is_file).then(|| image.offered(there, is_named)))
    };
    offer.vm.images = images.iter().filter_map(|it| offered(it).transpose()).collect::<Result<_, _>>()?;
    let mut there = peer.check_move(&offer).await?;
    if !there.unproven.is_empty() {
        offer.vm.contents = contents_of(host, &offer.vm, &there.unproven).await?;
        there = peer.check_move(&offer).await?;
    }
    offer.vm.own_disks.clone_from(&there.own_disks);
    let own = there.own_disks.clone();
    if let Some(other) = own.iter().find(|it| offer.vm.image(it).is_none()) {
        return Err(refused(
            name,
            &format!("{} asks for {}, which is none of its disks", there.host, other.display()),
            "",
        ));
    }
    let own: Vec<(PathBuf, PathBuf)> = own.into_iter().map(|there| (places.here(&there), there)).collect();
    let notes = own.iter().filter_map(|(here, there)| Some(in_words(here, there, images.get(here)?))).collect();
    let keep = move || own.into_iter().map(|(here, there)| leaving(here, there)).collect::<Result<Vec<_>, _>>();
    let locked = tokio::task::spawn_blocking(keep).await.expect("opening does not panic")?;
    let (disks, written) = locked.into_iter().unzip();
    offer.written = written;
    Ok(Plan { record, offer, to: met.hello.name, peer, peer_key: met.key, disks, notes, _markers: markers })
}

/// Its record, if it is one that can be moved while it does not run.
fn movable(host: &Host, name: &str) -> Result<VmRecord, AgentError> {
    let ended = host.idle(name).filter(|idle| matches!(idle.why, Idle::Ended(_)));
    let IdleVm { record, .. } = ended.ok_or_else(|| AgentError::UnknownVm { name: name.into() })?;
    if record.spec.adopted {
        let reason = "it was started by somebody else, who alone can start it as it was";
        return Err(refused(name, reason, "start it there, and `vmferry adopt` it"));
    }
    if record.spec.measuring {
        return Err(refused(name, "a measuring guest ends with its witness", ""));
    }
    match &record.changed {
        Some(changed) if !changed.obstacles.is_empty() => {
            Err(AgentError::Changed { name: name.into(), changes: changed.obstacles.clone() })
        }
        _ => Ok(record),
    }
}

fn offer(
    host: &Host,
    id: Uuid,
    record: &VmRecord,
    spec: VmSpec,
    markers: &Markers,
    request: &VmMoveRequest,
) -> Result<MoveOffer, AgentError> {
    let command = CommandLine::parse(&spec.argv)?;
    let vm = Offer {
        id,
        from: host.config.name.clone(),
        // It takes none before it is started.
        ram_bytes: 0,
        machine: command.machine_type().unwrap_or_default().into(),
        accelerator: record.accelerator.clone(),
        running: false,
        cpu_features: BTreeSet::new(),
        disks: markers.disks(),
        images: Vec::new(),
        own_disks: Vec::new(),
        disks_session: None,
        read_only: markers.read_only(),
        contents: BTreeMap::new(),
        networks: plugs(&command),
        stopped: true,
        disks_are_shared: request.disks_are_shared,
        setup: Setup::default(),
        protection: Protection::default(),
        external: None,
        spec,
    };
    Ok(MoveOffer { vm, autostart: record.autostart, written: Vec::new() })
}

/// The writable images of a VM that are files or block devices, by where they are; and the same as disks.
fn images_of(spec: &VmSpec, shared: bool) -> Result<(BTreeMap<PathBuf, Image>, Vec<Placed>), AgentError> {
    let command = CommandLine::parse(&spec.argv)?;
    let (mut images, mut disks) = (BTreeMap::new(), Vec::new());
    for words in command.images().into_iter().filter(|it| !it.read_only) {
        let path = spec.cwd.join(&words.file);
        // Of what is at a server, or absent, the other host says what is wrong with it.
        if std::fs::metadata(&path).is_ok_and(|it| it.is_file() || it.file_type().is_block_device()) {
            let image = Image::of(&spec.name, &path, &words, shared)?;
            disks.push(Placed {
                names: words.names,
                file: words.file,
                here: path.clone(),
                format: image.format.clone(),
                there: PathBuf::new(),
            });
            images.insert(path, image);
        }
    }
    Ok((images, disks))
}

impl Image {
    fn of(name: &str, path: &Path, words: &ImageWords, shared: bool) -> Result<Self, AgentError> {
        let known = std::fs::metadata(path).map_err(AgentError::io(path))?;
        let format = words.format.as_deref();
        let header = match format {
            None | Some("qcow2") => Qcow2::of(path).map_err(AgentError::io(path))?,
            Some(_) => None,
        };
        if header.as_ref().is_some_and(|it| it.has_data_elsewhere) {
            return Err(refused(name, &format!("what is in {} is in another file", path.display()), ""));
        }
        let format = format.unwrap_or(if header.is_some() { "qcow2" } else { "raw" }).to_owned();
        let backing = header.as_ref().and_then(|it| it.backing.as_deref());
        let is_bound = words.says_what_is_behind || backing.is_some_and(|it| !it.starts_with('/'));
        let mut behind = Vec::new();
        let mut next = header.map(|it| (path.to_owned(), it));
        while let Some((image, header)) = next.take() {
            let Some(backing) = &header.backing else { break };
            let file = match header.backing_file(&image) {
                Some(file) if behind.len() < LONGEST_CHAIN => file,
                _ if shared => break,
                _ => {
                    let reason =
                        format!("nothing tells that {backing}, behind {}, is the same on both hosts", image.display());
                    return Err(refused(name, &reason, "if you know that it is, say --disks-are-shared"));
                }
            };
            let header = Qcow2::of(&file).map_err(AgentError::io(&file))?;
            next = header.map(|header| (file.clone(), header));
            behind.push(file);
        }
        let (size, is_file) = (written(path)?.size, known.is_file());
        let allocated = if is_file { known.blocks().saturating_mul(512) } else { size };
        Ok(Self { format, size, allocated, is_file, is_bound, behind })
    }

    fn offered(&self, path: PathBuf, placed: bool) -> OwnImage {
        OwnImage {
            owner: None,
            mode: None,
            path,
            placed,
            device_id: None,
            format: self.format.clone(),
            size: self.size,
            allocated: self.allocated,
            backing: None,
        }
    }
}

/// Keeps an image from being written, and tells how it is now.
fn leaving(here: PathBuf, there: PathBuf) -> Result<(Leaving, Written), AgentError> {
    let in_use = |error| AgentError::Conflict { message: in_one_line(&error), hint: None };
    let lock = File::open(&here, Access::Read).map_err(in_use)?;
    let written = written(&here)?;
    let disk = VmMoveDisk { from: here, to: there, size: written.size };
    Ok((Leaving { disk, _lock: lock }, written))
}

/// When an image was last written; devices do not tell.
pub(super) fn written(path: &Path) -> Result<Written, AgentError> {
    let it = std::fs::metadata(path).map_err(AgentError::io(path))?;
    if it.file_type().is_block_device() {
        let size = std::fs::File::open(path).and_then(|mut device| device.seek(SeekFrom::End(0)));
        return Ok(Written { size: size.map_err(AgentError::io(path))?, seconds: 0, nanoseconds: 0 });
    }
    Ok(Written { size: it.len(), seconds: it.mtime(), nanoseconds: it.mtime_nsec() })
}

fn in_words(here: &Path, there: &Path, image: &Image) -> String {
    let how = match here == there {
        true => "is not shared and is copied".to_owned(),
        false => format!("is copied to {}", there.display()),
    };
    format!(
        "Its disk {} ({}, {} of {} in use) {how}.",
        here.display(),
        image.format,
        ByteSize(image.allocated),
        ByteSize(image.size)
    )
}
