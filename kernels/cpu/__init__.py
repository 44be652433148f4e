"""Steps of a network on the CPU in C++, compiled for the processor at hand when first used."""
