-- Change a state, if the one that the change is based on is still there, or none is.
-- KEYS: breaker.  ARGV: ..., state, milliseconds until its end, trips, milliseconds since it opened,
-- whether it holds whatever is there.
local stored = read(KEYS[1])
local insists = ARGV[9] == '1'
if stored and not insists and stored.version ~= ARGV[4] then return {0, told(stored)} end
if ARGV[5] == 'closed' and not insists and (not stored or told(stored)[2] == 'closed') then
  -- One that has opened and closed by itself stands in nobody's way.
  return {1, stored and told(stored) or {ARGV[4], 'closed', '-1', '0', '-1'}}
end
return {1, change(stored, ARGV[5], ARGV[6], ARGV[7], ARGV[8])}
