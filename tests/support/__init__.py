"""What tests share: models made on the spot, recordings, servers, terminals. No test imports another test."""
