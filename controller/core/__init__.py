"""What discovery decides: pure, without clocks and sockets."""
