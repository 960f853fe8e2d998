"""Programs for trying and testing the project: servers, records, demonstration, end-to-end check."""
