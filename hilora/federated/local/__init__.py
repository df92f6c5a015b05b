"""What a client does with a download: local algorithms, one file each."""
