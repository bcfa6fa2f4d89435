"""The contract between export and serve: manifest, store, preprocessing, session, metrics, errors. Never torch."""
