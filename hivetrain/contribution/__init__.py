"""What a miner commits to about its work, and how it is drawn, revealed and compared."""
