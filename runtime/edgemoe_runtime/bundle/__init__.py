"""The bundle's format: manifest, files, integrity; the standard library only."""
