//! What the link between two hosts of a testbed really carries, before anything is measured over it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// How long it is tried; the first part, in which a shaper lets a burst through, does not count.
const TIME: Duration = Duration::from_millis(700);
const BURST: Duration = Duration::from_millis(150);
const SOON: Duration = Duration::from_secs(5);

/// Bytes a second from the first namespace to the second, over one TCP connection.
pub(super) fn measure(namespaces: [&Path; 2], to: SocketAddr) -> std::io::Result<u64> {
    let [from_here, to_there] = namespaces;
    let address = SocketAddr::new(to.ip(), 0);
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        // A namespace is entered by a thread for itself, for good.
        let taking = scope.spawn(move || -> std::io::Result<u64> {
            enter(to_there)?;
            let listener = TcpListener::bind(address)?;
            // An error means that the other thread has given up.
            let _ = tell.send(listener.local_addr()?);
            let mut stream = accept(&listener)?;
            stream.set_read_timeout(Some(SOON))?;
            take(&mut stream)
        });
        let sending = scope.spawn(move || -> std::io::Result<()> {
            enter(from_here)?;
            let Ok(address) = told.recv() else { return Ok(()) };
            let mut stream = TcpStream::connect_timeout(&address, SOON)?;
            stream.set_write_timeout(Some(SOON))?;
            let (block, begun) = (vec![0x5a; 64 << 10], Instant::now());
            while begun.elapsed() < TIME {
                stream.write_all(&block)?;
            }
            Ok(())
        });
        sending.join().expect("sending does not panic")?;
        taking.join().expect("taking does not panic")
    })
}

fn enter(namespace: &Path) -> std::io::Result<()> {
    let file = std::fs::File::open(namespace)?;
    Ok(move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), Some(LinkNameSpaceType::Network))?)
}

/// The one that connects; not for ever, since it may have failed to.
fn accept(listener: &TcpListener) -> std::io::Result<TcpStream> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + SOON;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(error),
        }
    }
}

fn take(stream: &mut TcpStream) -> std::io::Result<u64> {
    let (mut buffer, begun) = (vec![0; 64 << 10], Instant::now());
    let (mut counted, mut since, mut last) = (0, None, Instant::now());
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        last = Instant::now();
        if begun.elapsed() > BURST {
            if since.is_none() {
                since = Some(last);
            } else {
                counted += count as u64;
            }
        }
    }
    let seconds = since.map_or(0.0, |since| (last - since).as_secs_f64());
    Ok(if seconds > 0.0 { (counted as f64 / seconds) as u64 } else { 0 })
}
