// Ends what a set_*.h began.
#pragma GCC pop_options
