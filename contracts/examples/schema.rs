//! Writes the generated documents into `contracts/schema/`.

use std::{fs, io, path::Path};

fn main() -> io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("schema");
    fs::create_dir_all(folder.join("events"))?;
    for (name, content) in headgate_contracts::schema::documents() {
        fs::write(folder.join(name), content)?;
    }
    Ok(())
}
