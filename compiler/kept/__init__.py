"""Work that is kept between runs: flushed when it is written, checked when it is read."""
