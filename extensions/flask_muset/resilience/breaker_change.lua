-- Change a state, if the one that the change is based on is still there, or none is.
-- KEYS: breaker.  ARGV: ..., state, milliseconds until its end, trips, milliseconds since it opened,
-- whether it holds whatever is there.
local stored = read(KEYS[1])
if stored and ARGV[9] == '0' and stored.version ~= ARGV[4] then return {0, told(stored)} end
return {1, change(stored, ARGV[5], ARGV[6], ARGV[7], ARGV[8])}
