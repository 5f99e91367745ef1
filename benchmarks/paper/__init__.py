"""The system of the GradsSharding paper (arXiv 2604.22072), as a rival: ``loop`` runs it, ``model`` has its memory, time and price."""
