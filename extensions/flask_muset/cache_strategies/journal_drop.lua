-- Forget a dead letter; 1 if there was one.  ARGV: place, id.
local entry = redis.call('XRANGE', DEAD, ARGV[2], ARGV[2])[1]
if not entry then return 0 end
redis.call('XDEL', DEAD, ARGV[2])
local key = named(entry[2]).k
if key then
  known(key)
  forget_letter(key)
  if redis.call('EXISTS', stream(key)) == 0 then clear(key, clock()) end
end
return 1
